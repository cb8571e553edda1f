"""The report that whoever has a GPU makes: what of it runs without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benches"))

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
