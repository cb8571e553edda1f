"""The planted faults as devices: what `esm-fast qualify` says of a machine whose Triton kernels have one of them.

    TRITON_INTERPRET=1 PYTHONPATH=tests/proof:tests/support python -m triton_proof.qualified_mutants [one]

With "one", of each file the first alone, as the tests do. Prints a line of JSON for each: [file, fault, outcome,
detail]; without a fault first. A qualification sees numbers, bits, guards and neighbours, so the interpreter watches
nothing here but what it gives: a lane that is masked off without `other` reads NaN, since a GPU leaves it undefined.
Each is tried in a process of its own, as `qualify` does.
"""

import json
import os
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from triton.runtime.interpreter import InterpreterBuilder
from triton_proof import mutants, numerics, sanitizer, speed

from esm_fast.inference import qualifying
from esm_fast.ops import OPS


def main() -> None:
    speed.install()
    numerics.install()
    InterpreterBuilder.create_masked_load = sanitizer.undefined_where_masked
    first = {mutant.module: mutant for mutant in reversed(mutants.MUTANTS)}
    for mutant in [None, *(first.values() if "one" in sys.argv[1:] else mutants.MUTANTS)]:
        about = [mutant.module, mutant.fault] if mutant else ["", ""]
        print(json.dumps([*about, *_tried(mutant)]), flush=True)


def _tried(mutant) -> list[str]:
    """The verdict of a child."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        try:
            with os.fdopen(write, "w") as answer:
                json.dump(_verdict(mutant), answer)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        found = answer.read()
    _, status = os.waitpid(child, 0)
    return json.loads(found) if found else ["crashed", f"signal {os.WTERMSIG(status)}"]


def _verdict(mutant) -> list[str]:
    """On the case that shows the fault; without one, on that of the first."""
    shown = mutant or mutants.MUTANTS[0]
    op = OPS[shown.op]
    few = [case for case in op.cases() if case.name == shown.case]
    OPS[shown.op] = replace(op, cases=lambda: few, bench_cases=lambda *_: [])
    grad = mutant is None or shown.direction == "bwd"
    task = {"op": shown.op, "dtype": "float32", "grad": grad, "head_dim": 0, "device": "cpu", "backend": "triton"}
    with tempfile.TemporaryDirectory() as folder, mutants.planted(mutant, Path(folder)) if mutant else nullcontext():
        return qualifying.prove(task)


if __name__ == "__main__":
    sys.exit(main())
