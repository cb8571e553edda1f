"""Every op of the Triton backend in the interpreter: forward and backward, three dtypes, every case of its contract.

Each test adds what it saw to the file named by ESM_FAST_PROOF, one JSON object a line.
"""

import pytest
import torch
from esm_fast.kernels import triton as triton_kernels
from triton_proof import checks, sanitizer, traffic

from esm_fast.ops import OPS, registry, verify
from esm_fast.ops.registry import Case, Op

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VERIFY = {"fwd": verify.forward, "bwd": verify.gradients}


def runs():
    """(op, its Triton kernel, dtype, direction, name of all that)."""
    assert registry.backends()["triton"] is None, registry.backends()["triton"]
    for op in OPS.values():
        for kernel in [kernel for kernel in registry.kernels(op.name) if kernel.backend == "triton"]:
            for dtype in DTYPES:
                for direction in ["fwd", "bwd"] if kernel.backward else ["fwd"]:
                    yield op, kernel, dtype, direction, f"{op.name}-{direction}-{str(dtype)[6:]}"


def with_cases():
    for *run, name in runs():
        for case in run[0].cases():
            yield pytest.param(*run, case, id=f"{name}-{case.name}")


def without_cases():
    return [pytest.param(*run, id=name) for *run, name in runs()]


@pytest.mark.parametrize("op, kernel, dtype, direction, case", list(with_cases()))
def test_against_fp64(op, kernel, dtype, direction, case, proof):
    """Within the tolerance rule in guarded memory; the launches are recorded."""
    require_runnable(op, kernel, dtype, case)
    with sanitizer.recording() as launches:
        for check in VERIFY[direction](op, kernel, verify.guarded(case), dtype, "cpu"):
            assert check.ok, check
    kernels = sorted({launch.kernel for launch in launches})
    assert kernels or case.name == "no_rows", "no Triton kernel ran"
    proof(op=op.name, direction=direction, dtype=str(dtype)[6:], case=case.name, kernels=kernels)


@pytest.mark.parametrize("op, kernel, dtype, direction", [p for p in without_cases() if torch.float16 not in p.values])
def test_neighbours_are_left_alone(op, kernel, dtype, direction):
    names = ("tile_edges", "ragged", "masked_rows", "rows_33") if op.name != "contact_map" else ("empty_between",)
    case = largest(op, lambda case: case.name in names)
    require_runnable(op, kernel, dtype, case)
    checks.neighbours_are_left_alone(op, kernel, case, dtype, checks.SHARES[op.name], grad=direction == "bwd")


@pytest.mark.parametrize("op, kernel, dtype, direction", [p for p in without_cases() if torch.bfloat16 in p.values])
def test_tiles_of_a_newer_architecture(op, kernel, dtype, direction, monkeypatch):
    """The interpreter takes the oldest one's otherwise; sm_90 and sm_100 have the largest."""
    for module in triton_kernels.MODULES:
        if hasattr(module, "capability"):
            monkeypatch.setattr(module, "capability", lambda tensor: 90)
    case = next((case for case in op.cases() if case.name == "primes"), largest(op))
    for check in VERIFY[direction](op, kernel, verify.guarded(case), dtype, "cpu"):
        assert check.ok, check


@pytest.mark.parametrize("op, kernel, dtype, direction", [p for p in without_cases() if torch.bfloat16 in p.values])
def test_traffic_is_recorded(op, kernel, dtype, direction, proof):
    """Bytes that are moved, over the fewest that must be."""
    case = traffic.CASES[op.name]
    require_runnable(op, kernel, dtype, case)
    moved, least = traffic.of_case(op, kernel, case, dtype, direction)
    assert moved.requested >= moved.distinct > 0
    proof(op=op.name, direction=direction, dtype=str(dtype)[6:], traffic_case=case.name,
          distinct=round(moved.distinct / least, 3), requested=round(moved.requested / least, 3))  # fmt: skip


def largest(op: Op, wanted=lambda case: True) -> Case:
    """Of an op's cases, the one that moves most."""
    cases = [case for case in op.cases() if wanted(case)]
    return max(cases, key=lambda case: op.cost(**verify.bound(op, case.build(torch.float32, "cpu", 0))).bytes)


def require_runnable(op, kernel, dtype, case):
    if reasons := kernel.why_not(op.request(verify.bound(op, case.build(dtype, "cpu", 0)))):
        pytest.skip("; ".join(reasons))
