"""What the documentation promises about itself: links lead somewhere, every variable is listed."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]
SOURCES = [
    path
    for folder in ("esm_fast", "kernels", "csrc", "tests", "benches")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
]


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link, as the usual hosts make it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_variable_is_listed():
    used = {name for path in SOURCES for name in re.findall(r"\bESM_FAST_[A-Z_]*[A-Z]\b", path.read_text())}
    used |= set(re.findall(r"\bESM_FAST_[A-Z_]*[A-Z]\b", (ROOT / "setup.py").read_text()))
    listed = set(re.findall(r"`(ESM_FAST_\w+)`", (ROOT / "docs" / "environment.md").read_text()))
    assert used == listed


def test_no_page_names_a_file_that_is_gone():
    """Paths of the repository in backticks."""
    tops = ("esm_fast/", "kernels/", "csrc/", "tests/", "benches/", "examples/", "docs/")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    files = set(tracked.stdout.split())
    for page in PAGES:
        for path in re.findall(r"`((?:[\w.\-]+/)+[\w.\-]*)`", page.read_text()):
            if path.startswith(tops):
                assert path in files or any(file.startswith(path.rstrip("/") + "/") for file in files), (
                    page.name,
                    path,
                )
