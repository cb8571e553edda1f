"""esm-fast kernels: what was proven of the Triton kernels without a GPU, from the tables that the tests renew."""

import argparse
import csv
from importlib.resources import files

NAME = "kernels"
ORDER = 51
HELP = "what was proven of the GPU kernels, and how they fit each architecture"
DESCRIPTION = """\
The Triton kernels were compiled and audited for each architecture and executed in Triton's interpreter,
against fp64. None of this was run on a GPU, and nothing here is a speed. Prints every kernel's registers,
shared memory and blocks an SM; with --matrix, what was proven for every op, direction and dtype."""
EXAMPLES = """\
  esm-fast kernels
  esm-fast kernels --matrix
"""
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--matrix", action="store_true", help="op x direction x dtype x architecture: what was proven")


def run(args: argparse.Namespace) -> None:
    compiled = read_table("audit.csv")
    table = matrix(read_table("interpreted.csv"), compiled) if args.matrix else _facts(compiled)
    args.summary.say(*_lines(table), rows=[dict(zip(table[0], row, strict=True)) for row in table[1:]])
    if args.matrix:
        args.summary.say(
            "\nfp64: cases of the op's contract within its tolerance rule, in Triton's interpreter"
            "\nok: compiled for that architecture at ESM-1b's sizes, all kernels of the op: no spilled register, shared"
            "\n    memory within the limit, and in matrix products its tensor-core instruction; -: not so"
            "\ntraffic: bytes moved over the fewest the contract allows, each address once a launch; in brackets, with"
            "\n    every repeated read; for the op's largest case in bf16"
        )


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of one of the tables beside the kernels."""
    with (files("esm_fast.kernels") / "triton" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def matrix(interpreted: list[dict], compiled: list[dict]) -> list[list[str]]:
    """Header and one line per op, direction and dtype. A cell is ok where every kernel the op launched is."""
    architectures = sorted({int(row["arch"]) for row in compiled})
    passed: dict[tuple, bool] = {}
    dtypes: dict[str, set[str]] = {}
    for row in compiled:
        key = (row["kernel"], row["dtype"], int(row["arch"]))
        passed[key] = passed.get(key, True) and sound(row)
        dtypes.setdefault(row["kernel"], set()).add(row["dtype"])

    def holds(kernel: str, dtype: str, arch: int) -> bool:
        only_fp32 = dtypes.get(kernel) == {"fp32"}  # it works on the residual stream, which is fp32 in every model
        return passed.get((kernel, "fp32" if only_fp32 else dtype, arch), False)

    lines = [["op", "direction", "dtype", "fp64", *(f"sm_{arch}" for arch in architectures), "traffic"]]
    for row in interpreted:
        dtype, launched = _SHORT[row["dtype"]], row["kernels"].split()
        cells = ["ok" if all(holds(kernel, dtype, arch) for kernel in launched) else "-" for arch in architectures]
        traffic = f"{row['distinct']} ({row['requested']})" if row["distinct"] else ""
        lines.append([row["op"], row["direction"], dtype, f"{row['cases']} cases", *cells, traffic])
    return lines


def sound(row: dict[str, str]) -> bool:
    """Whether one compilation keeps the rules; no block fits where the shared memory does not suffice."""
    return row["spilled"] == "0" and row["blocks"] != "0" and (row["gemm"] == "0" or row["tensor_core"] != "0")


def _facts(compiled: list[dict]) -> list[list[str]]:
    columns = ["kernel", "dtype", "arch", "warps", "registers", "shared", "tensor_core", "blocks", "constexprs"]
    return [columns, *([row[name] for name in columns] for row in compiled)]


def _lines(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
