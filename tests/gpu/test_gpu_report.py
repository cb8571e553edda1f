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
import gpu_report  # noqa: E402


def test_the_report_needs_a_gpu_or_a_dry_run(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_report.main([]) == 1
    assert "--dry-run" in capsys.readouterr().err


def test_the_report_can_be_made(tmp_path):
    """In a process of its own, as Triton must be told of its interpreter before it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed; the test extra has it on Linux x86-64")
    command = [sys.executable, gpu_report.__file__, "--dry-run", "--out", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert "passed" in found["tests"]["summary"] and not found["tests"]["failed"]
    ours = [row for row in found["ops"] if row["backend"] == "triton"]
    assert len(ours) >= 2 * 8 and all(row["ms"] != "" and not row["note"] for row in ours), ours
    (model,) = (row for row in found["models"] if row["model"] == "esm_fast triton")
    assert model["least cosine"] > 0.999 and not model["note"], model


def test_the_report_says_what_it_found(tmp_path):
    row = dict(op="pool", backend="triton", ms=1.5, note="a|b")
    found = {"facts": {"GPU": "none"}, "dry_run": True, "tests": {"summary": "1 passed", "failed": []}, "ops": [row]}
    gpu_report.write(found, str(tmp_path / "report"))
    assert json.loads((tmp_path / "report.json").read_text()) == found
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


def test_models_are_compared_on_every_backend_of_gpus(monkeypatch):
    monkeypatch.setattr(gpu_models, "find_spec", lambda name: None)  # without the other packages' models
    place = gpu_ops.Place.dry()
    with installed([]), admitted("cutlass"):
        rows = {row["model"]: row for row in gpu_models.rows(place)}
    assert rows["esm_fast cutlass"]["residues/s"] > 0 and rows["esm_fast cutlass"]["least cosine"] > 0.9999
    assert "cannot run on backend 'xformers'" in rows["esm_fast xformers"]["note"]
