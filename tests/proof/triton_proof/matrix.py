"""Runs every op in the interpreter, and keeps what came out in a committed table (kernels/triton/interpreted.csv).

Triton must be told of the interpreter before it is imported, so the tests in interpreted_*.py run in pytest processes
of their own, a few at a time. `esm-fast kernels --matrix` prints this table together with audit.csv.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
MODELS = HERE.parents[1] / "models"
DROPIN = ("test_fair_esm", "test_hf", "test_engine")  # whose tests dropin.py runs in the interpreter once more
TABLE = HERE.parents[2] / "kernels" / "triton" / "interpreted.csv"
PARTS = {
    "shim, fp32": "not float16 and not mutants and not dropin",
    "fp16, mutants, drop-in": "float16 and not bfloat16 or mutants or dropin",
    "bf16": "bfloat16",
}


# Bytes moved over the fewest possible (see traffic.py): at most so many times.
MOST_TRAFFIC = {
    "attention_varlen": 1.15,
    "masked_softmax": 1.15,
    "masked_lm_head": 1.15,
    "pack_rows": 1.15,
    "unpack_rows": 1.15,
    "gelu_ffn": 1.3,
    "pre_ln_attention": 1.3,
}


class Row(NamedTuple):
    """One op, direction and dtype: how many cases passed, the kernels they launched (of a backward, the forward's too),
    and of one case the bytes moved over the fewest possible (measured for bf16)."""

    op: str
    direction: str
    dtype: str
    cases: str
    kernels: str
    distinct: str
    requested: str


class Run(NamedTuple):
    process: subprocess.Popen
    output: Path
    record: Path

    def finish(self) -> str:
        """Waits; what it printed."""
        self.process.wait()
        return self.output.read_text()


def start(folder: Path) -> dict[str, Run]:
    """All parts at once."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    options = ("-q", "-o", "python_files=interpreted_*.py", "-p", "no:cacheprovider", "--tb=short")
    runs = {}
    for number, (name, keyword) in enumerate(PARTS.items()):
        output, record = folder / f"{number}.txt", folder / f"{number}.jsonl"
        command = [sys.executable, "-m", "pytest", *options, "-k", keyword, str(HERE)]
        if "or dropin" in keyword:
            command += ["-p", "triton_proof.dropin", *(str(MODELS / f"{file}.py") for file in DROPIN)]
        with open(output, "w") as file:
            process = subprocess.Popen(
                command,
                cwd=HERE.parents[2],
                env=environment | {"ESM_FAST_PROOF": str(record)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        runs[name] = Run(process, output, record)
    return runs


def rows(records: Iterable[Path]) -> list[Row]:
    """One row for every op, direction and dtype that was run."""
    cells: dict[tuple, dict] = {}
    for record in records:
        for line in record.read_text().splitlines():
            facts = json.loads(line)
            key = (facts["op"], facts["direction"], facts["dtype"])
            cell = cells.setdefault(key, {"cases": 0, "kernels": set(), "distinct": "", "requested": ""})
            if "traffic_case" in facts:
                cell |= {name: str(facts[name]) for name in ("distinct", "requested")}
            else:
                cell["cases"] += 1
                cell["kernels"] |= set(facts["kernels"])
    return [
        Row(*key, str(cell["cases"]), " ".join(sorted(cell["kernels"])), cell["distinct"], cell["requested"])
        for key, cell in sorted(cells.items())
    ]


def problems(table: list[Row]) -> list[str]:
    """Ops that move more than they may, and those of which nobody counted what they move."""
    counted = {(row.op, row.direction): row for row in table if row.distinct}
    found = [f"{op} {way} was not counted" for op in MOST_TRAFFIC for way in ("fwd", "bwd") if (op, way) not in counted]
    for row in counted.values():
        if float(row.distinct) > MOST_TRAFFIC.get(row.op, float("inf")):
            found.append(f"{row.op} {row.direction} moves {row.distinct} times the fewest bytes")
    return found


def read() -> list[Row]:
    """The committed table."""
    with open(TABLE, newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        runs = start(Path(folder))
        for name, run in runs.items():
            print(f"--- {name}\n{run.finish()[-3000:]}")
        if any(run.process.returncode for run in runs.values()):
            return 1
        table = rows(run.record for run in runs.values())
    with open(TABLE, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Row._fields, *table])
    return 0


if __name__ == "__main__":
    sys.exit(main())
