"""The report that whoever has a GPU makes: what of it runs without one."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benches"))

import gpu_report  # noqa: E402


def test_the_report_needs_a_gpu_or_a_dry_run(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_report.main([]) == 1
    assert "--dry-run" in capsys.readouterr().err


def test_the_report_says_what_it_found(tmp_path):
    row = dict(op="pool", backend="triton", ms=1.5, note="a|b")
    found = {"facts": {"GPU": "none"}, "dry_run": True, "tests": {"summary": "1 passed", "failed": []}, "ops": [row]}
    gpu_report.write(found, str(tmp_path / "report"))
    assert json.loads((tmp_path / "report.json").read_text()) == found
    text = (tmp_path / "report.md").read_text()
    assert "no number here is a speed" in text and "| pool | triton | 1.5 | a\\|b |" in text
