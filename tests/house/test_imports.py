"""Imports point one way: the graph of esm_fast and kernels, drawn from the source, lazy imports included."""

import ast
from functools import cache
from pathlib import Path

import esm_fast

ROOT = Path(__file__).resolve().parents[2]


def sources() -> dict[str, Path]:
    """Module name -> file; `kernels/` is imported as `esm_fast.kernels`."""
    found = {}
    for folder, prefix in (("esm_fast", "esm_fast"), ("kernels", "esm_fast.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


@cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, anywhere in its text."""
    known = sources()
    return {name: {target for target in _imported(name, path, known) if target != name} for name, path in known.items()}


def _imported(name: str, path: Path, known):
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in _executed(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(package, node)
            for alias in node.names:
                target = f"{base}.{alias.name}"
                if target in known:
                    yield target
                elif base in known:
                    yield base


def _executed(node: ast.AST):
    """All nodes but those that only type checkers see."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _executed(child)


def _absolute(package: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    up = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*up, *([node.module] if node.module else [])])


def circles() -> list[list[str]]:
    """The strongly connected parts of more than one module (Tarjan 1972)."""
    edges, index, low, stack, found = graph(), {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in edges[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            part = [stack.pop()]
            while part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def room(name: str) -> str:
    """esm_fast.train.loop -> train; esm_fast.alphabet -> alphabet."""
    return name.split(".")[1] if "." in name else ""


# Each may import itself and what stands before it.
ORDER = [
    *("alphabet", "console", "memory", "files", "sequences"),  # bytes, residues, batches
    *("ops", "formats", "packed", "quantized", "packed_file", "edits", "kernels"),  # what is computed, and by whom
    *("models", "weights", "download", "hub"),  # families, their files, and where those are
    *("inference", "train", "compat"),  # other packages' APIs stand above what they offer
    *("contacts", "dataset", "variants", "plots", "pretrained", "sklearn", "cli"),
]
# The registry looks the backends up: the one place where what is below finds what is above, by name.
DISCOVERY = {("esm_fast.ops.registry", "esm_fast.kernels")}


def test_no_module_imports_in_a_circle():
    assert circles() == []


def test_imports_point_one_way():
    place = {name: number for number, name in enumerate(ORDER)}
    edges = [(name, target) for name, targets in graph().items() for target in targets]
    rooms = {room(name) for edge in edges for name in edge} - {""}
    assert rooms <= set(place), "give the new room a place in ORDER"
    up = {edge for edge in edges if all(map(room, edge)) and place[room(edge[0])] < place[room(edge[1])]}
    assert up == DISCOVERY


def test_nothing_of_the_command_line_is_needed_below_it():
    assert {name for name, targets in graph().items() if any(room(t) == "cli" for t in targets)} <= {
        name for name in graph() if room(name) == "cli"
    }


def test_what_the_package_offers_is_there():
    """By its source, for some of it needs an extra; where a module makes its names, it is asked."""
    known = sources()
    for name, module in esm_fast._FROM.items():
        defined = _defined(known[f"esm_fast{module}"])
        assert name in defined or "__getattr__" in defined and hasattr(esm_fast, name), name
    assert {f"esm_fast.{name}" for name in esm_fast._MODULES} <= set(known)


def _defined(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return names | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def test_no_test_imports_another():
    """What several tests share lies in tests/support and tests/proof, not in one of them."""
    files = [path for folder in ("tests", "benches") for path in sorted((ROOT / folder).rglob("*.py"))]
    tests = {path.stem for path in files if path.stem.startswith(("test_", "interpreted_"))}
    found = {path.name: _roots(path) & tests for path in files}
    assert len(tests) > 90 and not {name: those for name, those in found.items() if those}


def _roots(path: Path) -> set[str]:
    """The modules that a file imports, and the names it imports from packages."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    aliases = [alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    return {part for name in aliases for part in name.split(".")} | {
        part for node in nodes if isinstance(node, ast.ImportFrom) for part in (node.module or "").split(".")
    }
