"""The tutorials run as they are written, and print what the pages say."""

import contextlib
import doctest
import io
import re
import shlex
from pathlib import Path

import pytest

from esm_fast.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for path in (ROOT / "docs" / "tutorials").glob("*.md") if path.name != "README.md")
NEEDS = {
    "regression": ("sklearn",),
    "finetune": ("sklearn",),
    "contacts": ("gemmi", "sklearn", "matplotlib"),
    "search": ("pyarrow",),
    "cluster": ("pyarrow",),
    "variants": ("scipy",),
    "pretrain": ("yaml", "matplotlib"),
}
# Decimals that a page states may be off by this much: types and machines round differently, and trees split on it.
TOLERANCE = {"regression": 0.05}
DECIMAL = re.compile(r"-?\d+\.\d+")
ELLIPSIS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """(language, text, line) of each fenced block; commands have no language."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(one[1], one[2], page.read_text()[: one.start()].count("\n") + 1) for one in found]


def run_commands(text: str) -> None:
    """Each line is a command of esm-fast, run in this process."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "esm-fast", f"not a command that can be run here: {line}"
            assert main(words[1:]) == 0, line


def within(tolerance: float, text: str, printed: str) -> str:
    """The text with each decimal that is near enough to the printed one in its place as it was printed."""
    found = iter(DECIMAL.findall(printed))

    def one(match) -> str:
        got = next(found, "nan")
        return got if abs(float(got) - float(match[0])) <= tolerance else match[0]

    return DECIMAL.sub(one, text) if tolerance else text


def test_decimals_are_compared():
    assert within(0.05, "a: 0.22\nb: -0.03", "a: 0.25\nb: 0.03") == "a: 0.25\nb: -0.03"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tutorial(page, tmp_path, monkeypatch):
    for name in NEEDS[page.stem]:
        pytest.importorskip(name, reason=f"{name} is not installed")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    scope, printed, compared = {"__name__": "__main__"}, "", 0
    for language, text, line in blocks(page):
        if language == "text":
            same = doctest.OutputChecker().check_output(
                within(TOLERANCE.get(page.stem, 0), text, printed), printed, ELLIPSIS
            )
            assert same, f"{page.name}, line {line}: expected\n{text}\nand got\n{printed}"
            compared += 1
            continue
        assert language in ("", "python"), f"{page.name}, line {line}: {language}"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            if language == "python":
                exec(compile("\n" * line + text, str(page), "exec"), scope)
            else:
                run_commands(text)
        printed = out.getvalue()
    assert compared, "the page shows no output"


def test_every_tutorial_is_listed():
    listed = set(re.findall(r"\]\((\w+)\.md\)", (ROOT / "docs" / "tutorials" / "README.md").read_text()))
    assert listed == {page.stem for page in PAGES} == set(NEEDS)
