"""What holds with the versions that are installed, such as the oldest that are allowed: `make compat`.

    python tests/proof/compat.py [imports|ops|machine-code|interpreter]

imports: every backend's module; ops: the op tests on the CPU; machine-code: every Triton kernel compiled for sm_90, its
spills and what exceeds the ceilings, which are Triton 3.9's; interpreter: the ops in Triton's interpreter.
Prints a line a step; exits 1 where one fails.
"""

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

PROOF = Path(__file__).parent
TESTS = PROOF.parent
sys.path[:0] = [str(PROOF), str(TESTS / "support")]
ARCH = 90
# By Triton's version: kernels that are known to spill, or to take more than the ceilings, in some of their types. What
# spills is right and slow; nothing else may.
KNOWN = {"3.6": ("contact_backward_k", "contact_backward_q", "attention_backward", "input_grad", "contact_tiles")}


def imports() -> str:
    import numpy
    import torch
    import triton

    from esm_fast.ops import registry

    broken = {name: why for name, why in registry.backends().items() if why and name != "xformers"}
    assert not broken, broken
    python = sys.version.split()[0]
    return f"Python {python}, torch {torch.__version__}, triton {triton.__version__}, numpy {numpy.__version__}"


def ops() -> str:
    return _pytest(str(TESTS / "ops" / "test_ops.py"), "-k", "not triton and not cuda")


def interpreter() -> str:
    where = ["-o", "python_files=interpreted_*.py", str(PROOF / "triton_proof"), "-k", "test_against_fp64"]
    return _pytest(*where, TRITON_INTERPRET="1")


def _pytest(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, cwd=TESTS.parent)
    lines = done.stdout.strip().splitlines() or [done.stderr[-500:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    assert done.returncode == 0, "\n  ".join([lines[-1], *failed[:20]])
    return lines[-1]


def machine_code() -> str:
    import triton
    from triton_proof import audit, ceilings

    numbers = [n for n, (_, arch) in enumerate(audit.compilations()) if arch == ARCH]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(audit.audit_number, numbers))
    known = next((names for v, names in KNOWN.items() if triton.__version__.startswith(v)), ())
    bad = {facts: facts.problems() + ceilings.problems(facts) for facts in found}
    for facts, problems in bad.items():
        if problems:
            print(f"  {'known' if facts.kernel in known else 'NEW'}: {facts}: {'; '.join(problems)}", flush=True)
    new = [facts for facts, problems in bad.items() if problems and facts.kernel not in known]
    assert not new, f"{len(new)} compilations have problems that are not known of Triton {triton.__version__}"
    spilled = sum(facts.spilled > 0 for facts in found)
    beyond = sum(map(bool, bad.values()))
    return f"{len(found)} compilations for sm_{ARCH}, {spilled} with spills, {beyond} beyond a ceiling"


STEPS = {"imports": imports, "ops": ops, "machine-code": machine_code, "interpreter": interpreter}


def main(names: list[str]) -> int:
    failed = 0
    for name in names or STEPS:
        try:
            print(f"{name}: {STEPS[name]()}", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"{name}: FAILED: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
