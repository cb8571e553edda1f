"""Data sets of scores: the same numbers as a scan, the same bytes however they were made, and single scores of them."""

import hashlib

import numpy as np
import pytest

import esm_fast
from esm_fast import variants
from esm_fast.cli import main

pytest.importorskip("pyarrow", reason="pyarrow is not installed")


@pytest.fixture
def fasta(tmp_path, protein):
    texts = {f"P{i}": protein(length, seed=i) for i, length in enumerate((30, 5, 1100, 17, 44))} | {
        "Q": protein(5, seed=1)
    }
    (tmp_path / "in.fasta").write_text("".join(f">sp|{name}|X\n{text}\n" for name, text in texts.items()))
    return tmp_path / "in.fasta", texts


def made(fasta, out, checkpoint, *options):
    arguments = ["variants", fasta, "-o", f"{out}/", "--model", checkpoint, "--unit-residues", 60]
    return main([str(argument) for argument in [*arguments, "--dtype", "float32", *options]])


def bytes_of(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("strategy", ["wt", "masked"])
def test_tables_are_scans(fasta, tmp_path, fair_checkpoint, ours, strategy, capsys):
    path, texts = fasta
    texts = {name: text for name, text in texts.items() if strategy == "wt" or len(text) < 100}
    path.write_text("".join(f">{name}\n{text}\n" for name, text in texts.items()))
    assert made(path, tmp_path / "out", fair_checkpoint, "--strategy", strategy, "--store", "float32") == 0
    atlas = variants.Atlas(tmp_path / "out")
    assert atlas.ids == list(texts)
    for name, text in texts.items():
        expected = variants.scan(ours, text, strategy=strategy).astype(np.float32)
        np.testing.assert_array_equal(atlas.table(name), expected)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_single_scores_are_looked_up(fasta, tmp_path, fair_checkpoint, ours, capsys):
    path, texts = fasta
    assert made(path, tmp_path / "out", fair_checkpoint) == 0
    text, capsys_out = texts["P2"], capsys.readouterr()
    assert "strategy  wt brandes (stored as float16)" in capsys_out.out
    name = f"{text[1049]}1050{'W' if text[1049] != 'W' else 'A'}"
    (score,) = variants.score(ours, text, [name])
    assert abs(variants.lookup(tmp_path / "out", f"P2 {name}") - score) < 0.01
    pair = f"{texts['P0'][2]}3W:{texts['P0'][7]}8C"
    assert abs(variants.lookup(tmp_path / "out", f"P0 {pair}") - variants.score(ours, texts["P0"], [pair])[0]) < 0.02
    assert main(["variants", str(tmp_path / "out"), "--lookup", f"P2 {name}", f"P2:p.{name}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "protein\tvariant\tscore" and lines[1].startswith(f"P2\t{name}\t{score:.1f}"[:-2])
    for query, words in (
        ("P9 A1C", "no protein 'P9'"),
        ("P0", "such as 'P04637 R175H'"),
        ("P0 A999C", "not among 1 to 30"),
    ):
        assert main(["variants", str(tmp_path / "out"), "--lookup", query]) == 1
        assert words in capsys.readouterr().err


def test_the_same_bytes_in_one_run_in_shares_and_resumed(fasta, tmp_path, fair_checkpoint, capsys):
    path, _ = fasta
    assert made(path, tmp_path / "one", fair_checkpoint) == 0
    for share in ("1/2", "0/2"):
        assert made(path, tmp_path / "two", fair_checkpoint, "--shard", share) == 0
    assert main(["finish", str(tmp_path / "two")]) == 0
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    whole = bytes_of(tmp_path / "one")
    (tmp_path / "one" / "run.json").unlink()
    next((tmp_path / "one" / "residues").iterdir()).unlink()
    assert made(path, tmp_path / "one", fair_checkpoint) == 0
    assert bytes_of(tmp_path / "one") == whole
    assert made(path, tmp_path / "one", fair_checkpoint, "--strategy", "masked") == 1
    assert "scan is 'masked optimal', and was 'wt brandes'" in capsys.readouterr().err


def test_scores_and_embeddings_are_told_apart(fasta, tmp_path, fair_checkpoint, capsys):
    path, _ = fasta
    made(path, tmp_path / "scores", fair_checkpoint)
    with pytest.raises(ValueError, match="is a data set of variants' scores"):
        esm_fast.open(tmp_path / "scores")
    arguments = ["embed", path, "-o", f"{tmp_path}/vectors", "--model", fair_checkpoint, "--overlength", "window"]
    assert main([str(argument) for argument in arguments]) == 0
    with pytest.raises(ValueError, match="is a data set of embeddings"):
        variants.Atlas(tmp_path / "vectors")


def test_a_protein_that_cannot_be_scored_keeps_the_reason(tmp_path, fair_checkpoint, capsys):
    (tmp_path / "in.fasta").write_text(">a\nMKT<mask>A\n>b\nMKUX\n")
    assert made(tmp_path / "in.fasta", tmp_path / "out", fair_checkpoint) == 3
    assert "failed    1 holds gaps or masks" in capsys.readouterr().err
    atlas = variants.Atlas(tmp_path / "out")
    assert atlas.status("a") == "holds gaps or masks" and np.isfinite(atlas.table("b")).all()


@pytest.mark.parametrize(
    "options, words",
    [(["--strategy", "pll"], "tables are made for wt and masked"), (["--png"], "--png is not for data sets")],
)
def test_refusals(fasta, tmp_path, fair_checkpoint, capsys, options, words):
    assert made(fasta[0], tmp_path / "out", fair_checkpoint, *options) == 1
    assert words in capsys.readouterr().err
