"""The report that whoever has a GPU makes: what of it runs without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cutlass_standin import admitted, installed

from esm_fast.ops import OPS, registry

sys.path.append(str(Path(__file__).parents[2] / "benches"))

import gpu_models  # noqa: E402
import gpu_ops  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_report  # noqa: E402


def test_the_report_needs_a_gpu_or_a_dry_run(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_report.main([]) == 1
    assert "--dry-run" in capsys.readouterr().err


def run(*arguments, out):
    """In a process of its own, as Triton must be told of its interpreter before it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed; the test extra has it on Linux x86-64")
    command = [sys.executable, gpu_report.__file__, "--dry-run", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_report_can_be_made_in_parts(tmp_path):
    """A part of each group; called again, it does none twice, nor what crashed, and it reads past a torn line."""
    out = tmp_path / "report"
    (tmp_path / "report.jsonl").write_text('{"part": "facts", "row": {"torn')
    done = run("--only", "facts", "smoke", out=out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert {part["ended"] for part in found["parts"]} == {"done"}, found["parts"]
    model = {row["backend"]: row for row in found["smoke"] if row["check"] == "model"}
    assert model["triton"]["ok"] and model["reference"]["ok"] and "needs a CUDA device" in model["cutlass"]["note"]
    threads = {row["backend"]: row for row in found["smoke"] if row["check"] == "thread"}
    assert threads["triton"]["ok"]
    before = (tmp_path / "report.jsonl").read_text()
    assert run("--only", "facts", "smoke", out=out).returncode == 0
    assert (tmp_path / "report.jsonl").read_text() == before


def test_a_part_that_fails_costs_itself(tmp_path, monkeypatch):
    """One that crashes, and one that hangs, are lines; the others run."""
    ran = []

    def part(name, limit, args):
        ran.append(name)
        return {"smoke a": ("crashed: signal 11", "illegal address"), "smoke b": ("hung", "")}.get(name, ("done", ""))

    monkeypatch.setattr(gpu_report, "run_part", part)
    record = gpu_report.Record(tmp_path / "r.jsonl")
    args = gpu_report.parse(["--limit", "30", "--out", str(tmp_path / "r")])
    for _ in range(2):
        gpu_report.run_all(["facts", "smoke a", "smoke b", "ops pool"], record, args)
    assert ran == ["facts", "smoke a", "smoke b", "ops pool"] and record.anything_wrong()
    assert record.ended()["smoke a"] == "crashed: signal 11"
    assert "smoke a: crashed: signal 11 illegal address" in "\n".join(gpu_report.markdown(record.found(), False))
    args = gpu_report.parse(["--limit", "30", "--again", "--budget", "10"])
    gpu_report.run_all(["smoke a"], record, args)
    assert len(ran) == 4  # no time is left for another part


def test_lines_of_another_machine_are_not_mixed(tmp_path):
    record = gpu_report.Record(tmp_path / "r.jsonl")
    record.require_same_machine({"GPU": "A", "torch": "1"})
    record.require_same_machine({"GPU": "A", "torch": "1"})
    with pytest.raises(SystemExit, match="begun elsewhere .GPU was A"):
        record.require_same_machine({"GPU": "B", "torch": "1"})


def test_every_kind_of_part_gives_rows():
    """Of those that are no smoke: one each, on the CPU."""
    place = gpu_ops.Place.dry()
    names = gpu_parts.names(place)
    assert {name.split()[0] for name in names} == set(gpu_report.GROUPS)
    (row,) = gpu_parts.rows("model fp32 esm_fast reference", place)
    assert row["ok"] and row["least cosine"] > 0.9999
    assert any(row["backend"] == "reference" and row["ms"] != "" for row in gpu_parts.rows("ops pool", place))


def test_the_report_says_what_it_found(tmp_path):
    row = dict(op="pool", backend="triton", ms=1.5, note="a|b")
    found = {"facts": [{"GPU": "none"}], "ops": [row], "parts": []}
    gpu_report.write(found, str(tmp_path / "report"), dry_run=True)
    assert json.loads((tmp_path / "report.json").read_text())["ops"] == [row]
    text = (tmp_path / "report.md").read_text()
    assert "no number here is a speed" in text and "| pool | triton | 1.5 | a\\|b |" in text


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("name", ["attention_varlen", "pre_ln_attention"])
def test_a_backend_of_gpus_is_verified_and_timed(name, direction):
    """On a stand-in for torch's operators."""
    op, place = OPS[name], gpu_ops.Place.dry()
    with installed([]) as log, admitted("cutlass"):
        kernel = next(kernel for kernel in registry.kernels(name) if kernel.backend == "cutlass")
        row = gpu_ops._measure(op, kernel, op.cases()[2], torch.float32, direction, place)
    assert row["ms"] > 0 and row["note"] == "" and log


def test_what_cannot_run_says_why():
    op, place = OPS["attention_varlen"], gpu_ops.Place.dry()
    contenders = dict(gpu_ops._contenders(op, place))
    assert {"cutlass", "xformers", "reference"} <= set(contenders)
    row = gpu_ops._measure(op, contenders["cutlass"], op.cases()[0], torch.float32, "fwd", place)
    assert row["ms"] == "" and row["note"].startswith("needs a CUDA device")


def test_a_wrong_kernel_is_not_timed():
    op, place = OPS["attention_varlen"], gpu_ops.Place.dry()
    wrong = registry.Kernel(op.name, "wrong", lambda q, *_: q)
    row = gpu_ops._measure(op, wrong, op.cases()[3], torch.float32, "fwd", place)
    assert row["ms"] == "" and row["note"].startswith("WRONG, not timed")


def test_models_are_compared_on_every_backend_of_gpus():
    place = gpu_ops.Place.dry()
    with installed([]), admitted("cutlass"):
        (row,) = gpu_models.rows("fp32", "esm_fast cutlass", place)
        assert row["residues/s"] > 0 and row["least cosine"] > 0.9999
        (row,) = gpu_models.rows("fp32", "esm_fast xformers", place)
        assert "cannot run on backend 'xformers'" in row["note"]
