"""Every op on every backend that can run it: `pytest benches/test_ops.py`, one table per op.

A kernel is verified against the op's reference in fp64 before it is timed; one that cannot run is skipped with its
reasons. Rows are `backend-device-dtype-case`; --benchmark-json also holds GFLOP/s and GB/s from the op's cost.
"""

import pytest
import torch

from esm_fast.ops.registry import OPS, REFERENCE, kernels
from esm_fast.ops.verify import widened

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Room for another order of summation, relative to the size of the result: the other half of the bound is the error that
# the reference itself makes in this dtype.
SLACK = {"fp32": 1e-6, "bf16": 2**-9}


def points() -> list:
    return [
        pytest.param(op, kernel, device, dtype, case, id=f"{name}-{kernel.backend}-{device}-{dtype}-{case.name}")
        for name, op in OPS.items()
        for case in op.bench_cases()
        for kernel in kernels(name)
        for device in DEVICES
        for dtype in DTYPES
    ]


@torch.inference_mode()
@pytest.mark.parametrize("op, kernel, device, dtype, case", points())
def test_op(op, kernel, device, dtype, case, benchmark):
    arguments = bind(op, case.build(DTYPES[dtype], device, seed=0))
    if reasons := kernel.why_not(op.request(arguments)):
        pytest.skip("; ".join(reasons))
    verify(op, kernel, arguments, SLACK[dtype])

    def call():
        kernel.forward(*arguments.values())
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = op.name
    benchmark.name = f"{kernel.backend}-{device}-{dtype}-{case.name}"
    benchmark(call)
    cost = op.cost(**arguments)
    for unit, amount in (("GFLOP/s", cost.flops), ("GB/s", cost.bytes)):
        benchmark.extra_info[unit] = round(amount / benchmark.stats.stats.median / 1e9, 2)


def bind(op, arguments):
    """The op's arguments in the order of its signature, defaults filled in, checked."""
    bound = op.bind((), arguments)
    op.check(**bound)
    return bound


def verify(op, kernel, arguments, slack):
    """A kernel may be at most twice as far from the truth in fp64 as the reference in its own dtype."""
    truth = tensors(op.reference(**widened(arguments)))
    plain = tensors(op.reference(*arguments.values()))
    got = plain if kernel.backend == REFERENCE else tensors(kernel.forward(*arguments.values()))
    for true, expected, actual in zip(truth, plain, got, strict=True):
        allowed = 2 * (expected.double() - true).abs().max() + slack * true.abs().max()
        error = (actual.double() - true).abs().max()
        assert error <= allowed, f"{op.name} on {kernel.backend}: error {error:.2e}, allowed {allowed:.2e}; not timed"


def tensors(outputs):
    """The tensors among an op's outputs; an op may leave some of them None."""
    return [output for output in (outputs if isinstance(outputs, tuple) else (outputs,)) if output is not None]
