"""esm_fast/_C.pyi says what the module is: the same names, parameters, and whether they are given by name."""

import ast
import re
import types
from pathlib import Path

import esm_fast
from esm_fast import _C

STUB = Path(esm_fast.__file__).with_name("_C.pyi")
CHECKED = {"Tensor": r"torch\.Tensor", "float": r"SupportsFloat|\bfloat\b", "bool": r"\bbool\b", "str": r"\bstr\b",
           "int": r"SupportsInt|\bint\b", "Weights": r"Weights"}  # fmt: skip


def stub_functions(body):
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def parameters_of(text: str) -> tuple[list[str], list[str], bool]:
    """Of a function's first docstring line: names, annotations, and whether all are given by name."""
    inner = text.splitlines()[0].partition("(")[2].rpartition(") ->")[0]
    pieces, depth = [""], 0
    for letter in inner:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += letter
    pieces = [piece.strip() for piece in pieces if piece.strip()]
    by_name = pieces[:1] == ["*"]
    pairs = [piece.partition(":") for piece in pieces[by_name:]]
    return [name for name, _, _ in pairs], [annotation for _, _, annotation in pairs], by_name


def require_same(name: str, node: ast.FunctionDef, function) -> None:
    names, annotations, by_name = parameters_of(function.__doc__)
    arguments = node.args.kwonlyargs if by_name else node.args.args
    assert bool(node.args.kwonlyargs) == by_name, name
    given = [argument.arg for argument in arguments if argument.arg != "self"]
    assert given == [n for n in names if n != "self"], name
    for argument, annotation in zip(reversed(arguments), reversed(annotations), strict=False):
        if argument.annotation is None:
            continue
        text = ast.unparse(argument.annotation)
        kind = text.removeprefix("torch.").removesuffix(" | None")
        optional = re.search(r"\| None$|^Optional\[.*\]$", annotation.strip()) is not None
        assert text.endswith("| None") == optional, (name, argument.arg)
        if kind in CHECKED:
            assert re.search(CHECKED[kind], annotation), (name, argument.arg, annotation)


def test_the_stub_is_the_module():
    tree = ast.parse(STUB.read_text())
    functions = stub_functions(tree.body)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    values = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    there = {name: value for name, value in vars(_C).items() if not name.startswith("_")}
    assert set(there) == {*functions, *classes, *values}
    for name, node in functions.items():
        assert isinstance(there[name], types.BuiltinFunctionType)
        require_same(name, node, there[name])
    for name, node in classes.items():
        members = {m for m in vars(there[name]) if not m.startswith("_")}
        assert members == {m for m in stub_functions(node.body) if not m.startswith("_")}, name
        for method, inner in stub_functions(node.body).items():
            if not method.startswith("_") and not inner.decorator_list:
                require_same(f"{name}.{method}", inner, vars(there[name])[method])


def test_kernels_take_their_arguments_by_name():
    kernels = [name for name, node in stub_functions(ast.parse(STUB.read_text()).body).items() if node.args.kwonlyargs]
    assert len(kernels) >= 18  # as many as ops.def lists
    listed = re.findall(r"X\((\w+),", (Path(__file__).parents[2] / "csrc" / "cpu" / "ops.def").read_text())
    assert sorted(kernels) == sorted({name for name in listed if name != "kernel"})


def test_the_types_ship():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert STUB.with_name("py.typed").exists() and '"*.pyi"' in setup and '"py.typed"' in setup
