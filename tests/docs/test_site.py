"""The site builds with nothing amiss: each page in its place, each link and each name of the API found."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds_strictly(tmp_path):
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api" / "models.html").read_text()
    assert "overlength" in api
    index = (tmp_path / "site" / "index.html").read_text()
    assert 'src="benchmarks.png"' in index and 'href="variants.html"' in index
    assert not [found for found in ("fonts.googleapis", "cdn.") if found in index]  # nothing is fetched from elsewhere
