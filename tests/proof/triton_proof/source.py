"""What can be told from the text of the kernels: loads without `other`, atomics, waits for the GPU.

A line that must wait says why, in a comment that begins with "waits:".
"""

import ast
from pathlib import Path

KERNELS = Path(__file__).parents[3] / "kernels" / "triton"
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize"}


def problems(text: str, name: str = "<text>") -> list[str]:
    """Every rule that a file of kernels breaks, with its line."""
    found, lines = [], text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        called, place = node.func.attr, f"{name}:{node.lineno}"
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "tl":
            if called == "load" and _has(node, "mask", 1) and not _has(node, "other", 2):
                found.append(f"{place}: a masked load without `other` is undefined where it is masked off")
            if called.startswith("atomic_"):
                found.append(f"{place}: {called} has no fixed order")
            if called == "dot" and not _has(node, "input_precision", 3):
                found.append(f"{place}: a dot without input_precision takes tf32 for fp32")
        elif called in WAITS and "# waits:" not in lines[node.lineno - 1]:
            found.append(f"{place}: .{called}() waits for the GPU")
    return found


def _has(call: ast.Call, keyword: str, position: int) -> bool:
    return len(call.args) > position or any(k.arg == keyword for k in call.keywords)
