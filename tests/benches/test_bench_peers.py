"""The side-by-side benchmark's machinery, on a toy model: its numbers are never looked at, its honesty is."""

import itertools
import json
import random
import subprocess
import sys
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
    import bench_peers
    import rounds

    for peak in ("gemm_peak", "raw_peak"):
        monkeypatch.setattr(rounds, peak, lambda *_: 1e9)
    return bench_peers


@pytest.fixture
def peers(bench, monkeypatch):
    """peers(change): change(peer) takes the place of each."""
    import rounds

    return lambda change: monkeypatch.setattr(rounds, "PEERS", [change(peer) for peer in rounds.PEERS])


@pytest.fixture
def fasta(tmp_path):
    draw = random.Random(0)
    lengths = [1, 5, 1100, *(draw.randrange(20, 200) for _ in range(17))]
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(f">p{i} made up\n{''.join(draw.choices(RESIDUES, k=n))}\n" for i, n in enumerate(lengths)))
    return path


def quick(fasta, out, *peers):
    return ["--tiny", "--fasta", str(fasta), "--out", str(out), "--rounds", "2", "--proteins", "8", "--peers", *peers]


TORCH_PEERS = ["fair-esm-fp32", "hf-fp32", "esm_fast-fp32", "hf-bf16", "torch-bf16-packed", "esm_fast-bf16"]


def test_run_verifies_times_and_writes(bench, fasta, tmp_path, capsys):
    import rounds

    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert bench.main(quick(fasta, out, *TORCH_PEERS)) == 0
    written = json.loads((out / "peers.json").read_text())
    assert [row["peer"] for row in written["rows"]] == TORCH_PEERS
    for row in written["rows"]:
        assert row["problem"] == "" and len(row["seconds"]) == 2
        assert row["error"] <= rounds.TOLERANCE["bf16" if "bf16" in row["peer"] else "fp32"]
    assert written["rows"][0]["x fair-esm fp32"] == 1.0
    table = (out / "peers.md").read_text()
    assert "| times faster than | esm_fast-fp32 | esm_fast-bf16 |" in table
    assert all(name in table for name in TORCH_PEERS) and "CPU:" in table
    assert table.split("\n\n")[0] in capsys.readouterr().out
    assert (out / "peers.png").read_bytes()[:4] == b"\x89PNG"


# A stand-in for esm-cpp, which reads what is written for it: names, shapes and calls are its own.
FAKE_ESM_CPP = """
from pathlib import Path
import json, torch
from esm_fast import weights
from esm_fast.alphabet import TOKENS
from esm_fast.models.padded import api_class
__version__, current_isa = "0", lambda: "made up"
class Tokenizer:
    def encode(self, text): return [0, *map(TOKENS.index, text), 2]
class Model:
    @staticmethod
    def load_from_safetensors(path):
        sizes = dict(model_type="esm", vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=32)
        sizes |= dict(layer_norm_eps=1e-5, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
        sizes |= dict(token_dropout=True, position_embedding_type="rotary")
        Path(path).with_name("config.json").write_text(json.dumps(sizes))
        checkpoint = weights.read(path)
        model = Model()
        model.inner = weights.build(checkpoint, api_class(checkpoint.config))
        return model
    def forward_scheduled(self, batch):
        with torch.inference_mode():
            return [self.inner(torch.tensor(ids)[None])["logits"][0].numpy() for ids in batch]
"""


def test_esm2_runs_too_and_engines_in_another_environment(bench, fasta, tmp_path, monkeypatch):
    """Verified as ESM-1b is; esm-cpp by a stand-in for it, in a process of its own."""
    (tmp_path / "esm_cpp.py").write_text(FAKE_ESM_CPP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peers = ["fair-esm-fp32", "hf-fp32", "esm-cpp-fp32", "hf-bf16", "torch-bf16-packed", "esm_fast-bf16"]
    arguments = [*quick(fasta, tmp_path, *peers), "--model", "esm2_t6_8M_UR50D", "--esm-cpp", sys.executable]
    assert bench.main(arguments) == 0
    rows = {row["peer"]: row for row in json.loads((tmp_path / "peers.json").read_text())["rows"]}
    assert rows["torch-bf16-packed"]["problem"].startswith("missing: written for learned positions")
    assert all(len(rows[name]["seconds"]) == 2 for name in peers if name != "torch-bf16-packed")
    assert rows["esm-cpp-fp32"]["error"] < 1e-5
    with pytest.raises(SystemExit):
        bench.main([*arguments, "--model", "esm3"])


@pytest.mark.parametrize("wrong_from", [1, 2], ids=["verification", "first timed run"])
def test_wrong_numbers_are_reported_and_not_in_the_table(bench, peers, fasta, tmp_path, wrong_from):
    def broken(peer):
        def build(setup):
            run, calls = peer.build(setup), itertools.count(1)
            return lambda job: run(job)[:: -1 if next(calls) >= wrong_from else 1]

        return replace(peer, build=build)

    peers(lambda peer: broken(peer) if peer.name == "hf-bf16" else peer)
    assert bench.main(quick(fasta, tmp_path, "hf-fp32", "hf-bf16")) == 1
    good, bad = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert len(good["seconds"]) == 2
    assert bad["problem"].startswith("failed: ValueError: error") and "residues/s" not in bad
    assert bad["problem"] in (tmp_path / "peers.md").read_text()


def test_missing_and_broken_peers_are_named(bench, peers, fasta, tmp_path):
    def refuse(setup):
        raise RuntimeError("no such instruction")

    changes = {
        "openvino-bf16": {"needs": ("no_such_module",)},
        "hf-bf16": {"build": refuse},
        "esm_fast-int8": {"why_not": lambda setup: "no such unit"},
    }
    peers(lambda peer: replace(peer, **changes.get(peer.name, {})))
    assert bench.main(quick(fasta, tmp_path, "hf-fp32", "hf-bf16", "openvino-bf16", "esm_fast-int8")) == 1
    rows = {row["peer"]: row for row in json.loads((tmp_path / "peers.json").read_text())["rows"]}
    assert rows["hf-bf16"]["problem"] == "failed: RuntimeError: no such instruction"
    assert rows["openvino-bf16"]["problem"] == "missing: no_such_module; pip install 'esm_fast[bench]'"
    assert rows["esm_fast-int8"]["problem"] == "missing: no such unit"
    assert rows["hf-fp32"]["seconds"]


def test_int8_is_held_to_a_cosine(bench):
    import rounds

    peer = next(peer for peer in rounds.PEERS if peer.name == "openvino-int8")
    truth = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    result = rounds.Result(peer)
    rounds.judge(result, truth + 0.05 * noise, truth)
    assert 0.99 < result.cosine < 1 and result.error > 0.1
    with pytest.raises(ValueError, match="cosine 0.9"):
        rounds.judge(result, truth + 0.2 * noise, truth)
    with pytest.raises(ValueError, match="error nan"):
        rounds.judge(result, truth * np.nan, truth)


def test_latency_is_of_one_protein_of_that_length(bench, fasta, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = quick(fasta, tmp_path, "hf-bf16", "esm_fast-bf16")
    assert bench.main([*arguments, "--latency", "150", "--profile"]) == 0
    written = json.loads((tmp_path / "peers.json").read_text())
    assert written["header"]["work"].startswith("1 of the 20 proteins of proteins.fasta, 150 residues (150 to 150")
    assert "| op: embedding" in (tmp_path / "peers.md").read_text()
    with pytest.raises(SystemExit, match="no protein of the file has 1023 residues"):
        bench.main([*arguments, "--latency", "1023"])


def test_breakdown_adds_up(bench, fasta, tmp_path):
    import breakdown
    import peers
    from common import TINY, Job, Setup
    from random_weights import random_state

    job = Job.write(bench.choose(bench.read(fasta), 0, 8, 4096), tmp_path / "job.fasta")
    run = peers.ours("float32")(Setup(TINY, random_state(TINY), 4096, []))
    found = breakdown.break_down(run, job)
    assert 0 < found.ops.total() < found.seconds
    assert set(found.ops) >= {"embedding"} and all(seconds >= 0 for seconds in found.phases.values())
    lines = [line.split("|")[1:-1] for line in breakdown.table(found, TINY, job, raw=1e9).splitlines()[2:]]
    shares = {name.strip(): float(share.strip(" %")) for name, _, share, *_ in lines}
    whole = shares.pop("the whole run")
    for first in ("op", "threads"):
        part = sum(share for name, share in shares.items() if name.startswith(("no " + first, first)))
        assert part == pytest.approx(whole, abs=0.5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_measured_in_a_process_of_its_own(bench, fasta, tmp_path):
    arguments = quick(fasta, tmp_path, "esm_fast-fp32", "esm_fast-bf16")
    assert bench.main([*arguments, "--memory"]) == 0
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [row["peer"] for row in rows] == ["esm_fast-fp32", "esm_fast-bf16"]
    assert rows[0]["weights"] == 2 * rows[1]["weights"] > 0
    for row in rows:
        assert row["peak"] >= row["after load"] > row["weights"]


def test_level_is_held_by_all(bench, fasta, tmp_path):
    """In a process of its own: the libraries read their level when they are loaded."""
    from esm_fast import _C

    if "avx2" not in _C.isas():
        pytest.skip("needs AVX2")
    command = [sys.executable, str(Path(bench.__file__)), *quick(fasta, tmp_path, "esm_fast-fp32")]
    done = subprocess.run([*command, "--isa", "avx2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "levels in use: ours avx2, torch AVX2 ONEDNN_MAX_CPU_ISA=AVX2" in done.stdout


def test_trained_like_weights_have_outliers_and_keep_their_scale(bench):
    from common import Size
    from random_weights import random_state, trained_like_state

    size = Size(layers=3, embed_dim=256, ffn_embed_dim=512, attention_heads=4)
    plain, state = random_state(size), trained_like_state(size)
    gains = state["layers.1.final_layer_norm.weight"]
    assert gains.max() > 8 * gains.median() and set(state) == set(plain)
    row = (state["layers.1.fc1.weight"] * gains).square().sum(1).sqrt().mean()
    assert 0.3 < row / plain["layers.1.fc1.weight"].square().sum(1).sqrt().mean() < 3
    assert state["layers.2.fc2.bias"].abs().max() == 100


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
    from common import padded_batches

    lengths = random.Random(1).choices(range(3, 1025), k=200)
    batches = list(padded_batches(lengths, 4096))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 4096 for batch in batches)
    assert list(padded_batches([5000, 3], 4096)) == [[0], [1]]


def test_cost_is_esm1bs(bench):
    gemm, attention = bench.Size().flops(np.array([1024]))
    assert gemm == pytest.approx(1.298e9 * 1024, rel=1e-3)
    assert attention / gemm == pytest.approx(0.133, abs=2e-3)


def test_table_is_markdown(bench):
    from report import COLUMNS
    from tables import markdown

    row = {"peer": "a", "problem": "", "median s": 1.0, "min s": 0.5, "residues/s": 10.0, "error": 0.0}
    *table, _, note = markdown([row, {"peer": "b", "problem": "missing: c", "error": None}], COLUMNS).splitlines()
    assert len(table) == 4 and {line.count("|") for line in table} == {len(COLUMNS) + 1}
    assert table[3].split()[:4] == ["|", "b", "|", "missing"] and note == "- b missing: c"
