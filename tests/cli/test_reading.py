"""A command reads a checkpoint once: for its numbers, for damage and for its fingerprint together."""

import sys
from collections import Counter
from pathlib import Path

import pytest

import esm_fast
from esm_fast import weights
from esm_fast.cli import main
from esm_fast.weights import integrity

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

FOLDER: Path | None = None  # that is watched
OPENED: Counter = Counter()
# Whoever opens a checkpoint in Python: the first 512 bytes; torch, which maps the file.
HEAD, MAPS = {"kind_of"}, {"read_torch", "__init__", "_is_zipfile", "load", "get_unsafe_globals_in_checkpoint"}


def _note(event: str, arguments: tuple) -> None:
    if event == "open" and FOLDER is not None and isinstance(arguments[0], str):
        path = Path(arguments[0])
        if path.parent == FOLDER and path.suffix in (".pt", ".safetensors"):
            OPENED[path.name, sys._getframe(1).f_code.co_name] += 1


@pytest.fixture(scope="module", autouse=True)
def hook():
    global FOLDER
    sys.addaudithook(_note)  # for good: it does nothing where no folder is watched
    yield
    FOLDER = None


@pytest.mark.parametrize("kind", ["fair-esm", "own"])
def test_a_command_reads_a_checkpoint_once(fair_checkpoint, tmp_path, monkeypatch, kind):
    global FOLDER
    model = tmp_path / ("tiny.pt" if kind == "fair-esm" else "tiny.safetensors")
    if kind == "fair-esm":
        model.write_bytes(fair_checkpoint.read_bytes())
    else:
        weights.save(esm_fast.load(fair_checkpoint)[0], model)
    (tmp_path / "in.fa").write_text(">p\nMKVLLW\n>q\nMKTAYI\n")
    (tmp_path / "in.csv").write_text(
        "sequence,y\n" + "".join(f"{'MKV' * (i % 5 + 1)}{'A' * i},{i}\n" for i in range(9))
    )
    monkeypatch.chdir(tmp_path)
    for command in (
        "embed in.fa -o embedded/",
        "embed in.fa -o in.h5",
        "variants in.fa -o scanned/",
        "variants in.fa -o in.tsv",
        "search embedded in.fa",
        "report in.fa -o in.html --data-set embedded --scan wt",
        "finetune in.csv -o predictor --task regression",
    ):
        monkeypatch.setenv("ESM_FAST_CACHE", str(tmp_path / "cache" / command.replace("/", "")))
        monkeypatch.setattr(integrity, "_known", {})  # as in a new process of a user who never read it
        OPENED.clear()
        FOLDER = tmp_path
        assert main([*command.split(), "--model", model.name]) == 0, command
        FOLDER = None
        by = {who: count for (name, who), count in OPENED.items() if name == model.name}
        assert by.pop("_read") == 1, (command, by)
        assert set(by) <= HEAD | MAPS, (command, by)
