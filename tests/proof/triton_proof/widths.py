"""How many bytes a lane loads at once, read off Triton's own layouts: no machine code is generated, half a second each.

    PYTHONPATH=tests/proof:tests/support python -m triton_proof.widths [ARCH ...]

A tile whose columns lie side by side is loaded 16 bytes at a time, unless something on the way hid that from the
compiler, as a minimum does that may be any column: then it is two bytes at a time, 8 times the instructions, and no
asynchronous copy. The numbers are as right as before, so nothing else sees it.
"""

import re
import sys
from typing import NamedTuple

from .audit import ARCHITECTURES, Spec, _in_table, compile_specs, made

WHOLE = 16
_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "i64": 8, "i1": 1, "i8": 1}
_LAYOUT = re.compile(r"^#(\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\].*?order = \[([\d, ]+)\]", re.M)
_LOAD = re.compile(
    r"(tt\.load|ttg\.async_copy_global_to_local)\b.*?(?:\{contiguity = (\d+) : i32\} )?: "
    r"tensor<(\d+x\d+)x!tt\.ptr<(\w+)>, #(\w+)>"
)
# Rows of maps begin at any element, and a column of them is as far apart as a map is wide.
ANYWHERE = {"masked_softmax_forward", "masked_softmax_backward", "contact_backward_q", "contact_backward_k",
            "contact_backward_sums"}  # fmt: skip


class Load(NamedTuple):
    """of a tile, such as "64x128": how many bytes a lane loads at once."""

    tile: str
    dtype: str
    bytes: int


def layouts_of(spec: Spec, capability: int) -> str:
    """Triton's IR with the layouts of its tensors."""
    with made(spec, capability) as (module, stages):
        for name in ("ttir", "ttgir"):
            module = stages[name](module, {"name": spec.kernel_name})
        return str(module)


def loads_of(text: str) -> list[Load]:
    """Every load of a tile with two dimensions."""
    layouts = {name: (_numbers(sizes), _numbers(order)) for name, sizes, order in _LAYOUT.findall(text)}
    found = []
    for _, contiguity, tile, dtype, layout in _LOAD.findall(text):
        if not contiguity:
            sizes, order = layouts.get(layout, ([1, 1], [1, 0]))
            contiguity = sizes[order[0]]
        found.append(Load(tile, dtype, min(WHOLE, int(contiguity) * _BYTES[dtype])))
    return found


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def narrow(spec: Spec, capability: int) -> list[Load]:
    """The loads that are not whole, of a kernel whose rows lie side by side."""
    if spec.kernel_name in ANYWHERE:
        return []
    return [load for load in loads_of(layouts_of(spec, capability)) if load.bytes < WHOLE]


def main() -> int:
    bad = 0
    for arch in map(int, sys.argv[1:] or ARCHITECTURES):
        for spec in filter(_in_table, compile_specs(arch)):
            if found := narrow(spec, arch):
                bad += 1
                print(f"{spec.kernel_name} {spec.dtype} sm_{arch} {spec.constexprs}: {found}", flush=True)
    print(f"{bad} kernels load a tile in narrow pieces")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
