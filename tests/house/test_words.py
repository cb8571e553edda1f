"""One word, one thing: docs/architecture.md says which; names in the code keep to it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("esm_fast", "kernels", "benches", "tests")
# Who asks for a share of the work by a name that users have: shard="I/N".
PUBLISHED = {"build_dataset", "build_atlas"}
GONE = {"go_on", "look_on", "face", "onlooker"}


def asks_for_a_share(tree: ast.AST) -> list[str]:
    """Functions that call "shard" what they are given to choose a share of the work by: text, such as "0/4"."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        function.name
        for function in functions
        for given in (*function.args.args, *function.args.kwonlyargs)
        if given.arg in ("shard", "shards") and given.annotation and "str" in ast.unparse(given.annotation)
    ]


# In prose: resume or continue, API, prepacked weights.
GONE_IN_TEXT = re.compile(r"\b(go(es)? on|look(s|ing)? on)\b|\bface\b|(?<!pre)\bpacked (weights?|file|model|matri)\b")
PROPER = re.compile(r"hugging\s+(?://|#)?\s*face", re.IGNORECASE)
TEXTS = (".py", ".md", ".h", ".cpp", ".cu", ".cuh")


def names(tree: ast.AST):
    for node in ast.walk(tree):
        yield from (getattr(node, field) for field in ("id", "arg", "attr", "name") if hasattr(node, field))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_share_is_called_a_share_and_words_that_went_stay_away(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        assert set(asks_for_a_share(tree)) <= PUBLISHED, path
        assert not GONE & set(names(tree)), path


@pytest.mark.parametrize("folder", [*FOLDERS, "csrc", "docs", "examples"])
def test_prose_says_the_words_of_the_field(folder):
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in TEXTS and path != Path(__file__):
            text = PROPER.sub("", path.read_text())
            found = [line for line in text.splitlines() if GONE_IN_TEXT.search(line)]
            assert not found, (path, found)


def test_another_name_is_found():
    assert asks_for_a_share(ast.parse("def work(options, shard: str | None): ...")) == ["work"]
    assert "go_on" in set(names(ast.parse("plan.go_on()")))
