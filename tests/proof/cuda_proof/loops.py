"""How much of attention's inner loop is tensor-core instructions, read off the machine code for sm_70 in fp16.

The loop is the one that a branch back closes and that holds all the tensor-core instructions. Its instructions are
counted once, as they stand, with those that copy narrow heads, which wide ones jump over.
`PYTHONPATH=tests/proof:tests/support python -m cuda_proof.loops` writes the table; tests hold it against the source.
"""

import csv
import re
from typing import NamedTuple

from . import audit

TABLE = audit.ROOT / "kernels" / "cuda" / "loops.csv"
SOURCE, SCALAR, ARCH = "attention", "f16", 70
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", re.MULTILINE)


class Loop(NamedTuple):
    """Instructions of a kernel's inner loop, and how many of them are tensor cores'."""

    key: str
    kernel: str
    instructions: int
    hmma: int

    @property
    def share(self) -> float:
        return self.hmma / self.instructions


def inner_loop(code: str) -> tuple[int, int]:
    """(instructions, tensor-core instructions) of the smallest loop that holds all of the latter; (0, 0) for none."""
    found = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(code)]
    tensor = [at for at, name, _ in found if "HMMA" in name]
    loops = []
    for end, name, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and tensor and int(target[1], 16) <= tensor[0] and tensor[-1] <= end:
            loops.append(sum(int(target[1], 16) <= at <= end for at, _, _ in found))
    return (min(loops), len(tensor)) if loops else (0, 0)


def unit():
    return next(u for u in audit.build.units() if (u.source.stem, u.scalar, u.arch) == (SOURCE, SCALAR, ARCH))


def read_table() -> list[Loop]:
    with open(TABLE, newline="") as file:
        return [Loop(r["key"], r["kernel"], int(r["instructions"]), int(r["hmma"])) for r in csv.DictReader(file)]


def main() -> None:
    attention = unit()
    listing = audit.listing(audit.build.Nvrtc().compile(attention))
    rows = [Loop(audit.key_of(attention), kernel, *inner_loop(code)) for kernel, code in sorted(listing.items())]
    with open(TABLE, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Loop._fields, *rows])
    print(*(f"{loop.kernel} {loop.share:.1%}" for loop in rows), sep="\n")


if __name__ == "__main__":
    main()
