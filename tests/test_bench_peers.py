"""The side-by-side benchmark's machinery, on a toy model: its numbers are never looked at, its honesty is."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("esm.model.esm1", reason="needs fair-esm")
pytest.importorskip("transformers")

RESIDUES = "LAGVSERTIDPKQNFYMHWC"


@pytest.fixture(autouse=True)
def threads():
    """The benchmark may set torch's threads; the tests after it must not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benches"))
    import bench_peers

    monkeypatch.setattr(bench_peers, "gemm_peak", lambda dtype: 1e9)
    return bench_peers


@pytest.fixture
def fasta(tmp_path):
    draw = random.Random(0)
    lengths = [1, 5, 1100, *(draw.randrange(20, 200) for _ in range(17))]
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(f">p{i} made up\n{''.join(draw.choices(RESIDUES, k=n))}\n" for i, n in enumerate(lengths)))
    return path


def quick(fasta, out, *peers):
    return ["--tiny", "--fasta", str(fasta), "--out", str(out), "--rounds", "2", "--proteins", "8", "--peers", *peers]


TORCH_PEERS = ["fair-esm-fp32", "hf-fp32", "esm_fast-fp32", "hf-bf16", "esm_fast-bf16"]


def test_run_verifies_times_and_writes(bench, fasta, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert bench.main(quick(fasta, out, *TORCH_PEERS)) == 0
    written = json.loads((out / "peers.json").read_text())
    assert [row["peer"] for row in written["rows"]] == TORCH_PEERS
    for row in written["rows"]:
        assert row["problem"] == "" and len(row["seconds"]) == 2
        assert row["error"] <= bench.TOLERANCE["bf16" if "bf16" in row["peer"] else "fp32"]
    assert written["rows"][0]["x fair-esm fp32"] == 1.0
    table = (out / "peers.md").read_text()
    assert all(name in table for name in TORCH_PEERS) and "CPU:" in table
    assert table.split("\n\n")[0] in capsys.readouterr().out
    assert (out / "peers.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("wrong_from", [1, 2], ids=["verification", "first timed run"])
def test_wrong_numbers_are_reported_and_not_in_the_table(bench, fasta, tmp_path, monkeypatch, wrong_from):
    def broken(peer):
        def build(setup):
            run, calls = peer.build(setup), itertools.count(1)
            return lambda proteins: run(proteins)[:: -1 if next(calls) >= wrong_from else 1]

        return replace(peer, build=build)

    monkeypatch.setattr(bench, "PEERS", [broken(peer) if peer.name == "hf-bf16" else peer for peer in bench.PEERS])
    assert bench.main(quick(fasta, tmp_path, "hf-fp32", "hf-bf16")) == 1
    good, bad = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert len(good["seconds"]) == 2
    assert bad["problem"].startswith("failed: ValueError: error") and "residues/s" not in bad
    assert bad["problem"] in (tmp_path / "peers.md").read_text()


def test_missing_and_broken_peers_are_named(bench, fasta, tmp_path, monkeypatch):
    def refuse(setup):
        raise RuntimeError("no such instruction")

    changes = {"openvino-bf16": {"needs": ("no_such_module",)}, "hf-bf16": {"build": refuse}}
    monkeypatch.setattr(bench, "PEERS", [replace(peer, **changes.get(peer.name, {})) for peer in bench.PEERS])
    assert bench.main(quick(fasta, tmp_path, "hf-fp32", "hf-bf16", "openvino-bf16")) == 1
    rows = {row["peer"]: row for row in json.loads((tmp_path / "peers.json").read_text())["rows"]}
    assert rows["hf-bf16"]["problem"] == "failed: RuntimeError: no such instruction"
    assert rows["openvino-bf16"]["problem"] == "missing: no_such_module; pip install 'esm_fast[bench]'"
    assert rows["hf-fp32"]["seconds"]


def test_subsets_keep_the_spread_of_lengths(bench):
    proteins = [(f"p{i:03d}", "A" * n) for i, n in enumerate(range(1, 1001))]
    for chosen, again in (
        (bench.choose(some, residues, count, 4096) for some in (proteins, proteins[::-1]))
        for residues, count in ((30_000, None), (0, 60))
    ):
        lengths = sorted(len(residues) for _, residues in chosen)
        assert chosen == again
        assert sum(lengths) == pytest.approx(30_000, rel=0.1)
        assert lengths[0] < 300 and lengths[-1] > 900
    assert len(bench.choose(proteins, 0, 5000, 4096)) == len(bench.choose(proteins, 10**9, None, 4096)) == 1000


def test_whole_batches_pad_as_the_whole_file_does(bench):
    draw = random.Random(2)
    proteins = [(f"p{i}", "A" * draw.randrange(1, 1023)) for i in range(200)]
    chosen = bench.choose(proteins, 15_000, None, 4096)
    (batches, share), (of_whole, share_of_whole) = bench.padding(chosen, 4096), bench.padding(proteins, 4096)
    assert len(set(chosen)) == len(chosen) and 1 < batches < of_whole / 4
    assert share == pytest.approx(share_of_whole, abs=0.03)


def test_padded_batches_hold_each_protein_once_within_the_budget(bench):
    lengths = random.Random(1).choices(range(3, 1025), k=200)
    batches = list(bench.padded_batches(lengths, 4096))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 4096 for batch in batches)
    assert list(bench.padded_batches([5000, 3], 4096)) == [[0], [1]]


def test_cost_is_esm1bs(bench):
    gemm, attention = bench.Size().flops(np.array([1024]))
    assert gemm == pytest.approx(1.298e9 * 1024, rel=1e-3)
    assert attention / gemm == pytest.approx(0.133, abs=2e-3)


def test_table_is_markdown(bench):
    row = {"peer": "a", "problem": "", "median s": 1.0, "min s": 0.5, "residues/s": 10.0, "error": 0.0}
    *table, _, note = bench.markdown([row, {"peer": "b", "problem": "missing: c", "error": None}]).splitlines()
    assert len(table) == 4 and {line.count("|") for line in table} == {len(bench.COLUMNS) + 1}
    assert table[3].split()[:4] == ["|", "b", "|", "missing"] and note == "- b missing: c"
