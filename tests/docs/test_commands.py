"""Each command that a page, a recipe or a help text shows is one that esm-fast takes; the README's first lines run."""

import contextlib
import io
import re
import shlex
from pathlib import Path

from esm_fast import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.*"))]


def shown() -> list[tuple[str, str]]:
    """(where, command line): in fenced blocks, in recipes' comments, and in the examples of --help."""
    texts = []
    for page in PAGES:
        if page.suffix == ".md":
            fenced = re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
            texts += [(page.name, text) for text in fenced]
        elif page.suffix == ".yaml":
            texts.append((page.name, re.sub(r"^# *", "", page.read_text(), flags=re.MULTILINE)))
    texts += [(f"{command.name} --help", command.module().EXAMPLES) for command in cli.commands()]
    found = []
    for where, text in texts:
        lines = re.findall(r"^ *(?:[A-Z_]+=\S+ )*(?:\w.* \| )?esm-fast (.+)$", text.replace("\\\n", " "), re.MULTILINE)
        found += [(where, line) for line in lines]
    return found


def test_every_command_that_is_shown_is_one():
    lines, wrong = shown(), []
    assert len(lines) > 100 and {where for where, _ in lines} > {"README.md", "embedding.md", "esm1b_t6_demo.yaml"}
    for where, line in lines:
        words = shlex.split(re.split(r" [|>&] ?|;|\)\"", line)[0], comments=True)
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                cli.parser().parse_args(words)
        except SystemExit as left:
            if left.code:
                wrong.append(f"{where}: {line}: {errors.getvalue().splitlines()[-1]}")
    assert not wrong, "\n".join(wrong)


def test_the_first_lines_of_the_readme_run(monkeypatch):
    code = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    monkeypatch.chdir(ROOT)
    scope = {}
    exec(code, scope)
    assert scope["layers"][-1].shape == (192,) and "import esm_fast" in code
