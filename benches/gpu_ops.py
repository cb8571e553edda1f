"""Every op on every backend of a GPU, forward and backward, beside torch's own: verified, then timed.

A part of `gpu_report.py`, which the owner of a GPU runs once and sends: a kernel that fails is a row with the reason
and not the end of the run, and times are the device's own events. `bench_ops.py` takes turns, and stops at what is
wrong.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch._dynamo

from esm_fast.ops import OPS, registry, verify
from esm_fast.ops.registry import REFERENCE, Kernel

COMPILED = "torch.compile"
NOT_EAGER = {"fail_on_recompile_limit_hit": True}  # or it runs without the compiler, and says nothing
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Place(NamedTuple):
    """Where the report is made. A dry run takes the smallest case of every op, one call, and fp32 alone: Triton's
    interpreter calculates with the bits of a bf16 as if they were an integer."""

    device: str
    dtypes: tuple[str, ...]
    calls: int
    tiny: bool
    facts: dict[str, str]

    @classmethod
    def gpu(cls) -> "Place":
        major, minor = torch.cuda.get_device_capability()
        properties = torch.cuda.get_device_properties(0)
        facts = {"compute capability": f"{major}.{minor}", "memory": f"{properties.total_memory / 2**30:.0f} GiB",
                 "multiprocessors": properties.multi_processor_count, "CUDA": str(torch.version.cuda),
                 "L2": f"{properties.L2_cache_size >> 20} MiB"}  # fmt: skip
        return cls("cuda", tuple(DTYPES), 20, False, facts)

    @classmethod
    def dry(cls) -> "Place":
        return cls("cpu", ("fp32",), 1, True, {"device": "none: Triton's interpreter"})

    def milliseconds(self, call: Callable[[], object]) -> float:
        """The median of several calls after two for warming up, the L2 cache emptied before each."""
        if self.device == "cpu":
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        for _ in range(2):
            call()
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        times, flush = [], torch.empty(2 * cache, dtype=torch.int8, device="cuda")
        for _ in range(self.calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)


def rows(op_name: str, place: Place) -> Iterator[dict]:
    """One a backend, case, dtype and direction; what cannot run has its reasons in place of numbers."""
    op = OPS[op_name]
    cases = sorted(op.cases(), key=lambda case: _bytes(op, case))[:1] if place.tiny else op.bench_cases()
    for case in cases:
        for dtype in place.dtypes:
            for name, kernel in _contenders(op, place):
                for direction in ("fwd", "bwd"):
                    about = dict(op=op.name, case=case.name, dtype=dtype, backend=name, direction=direction)
                    yield about | _measure(op, kernel, case, DTYPES[dtype], direction, place)


def _bytes(op, case) -> int:
    return op.cost(**verify.bound(op, case.build(torch.float32, "cpu", 0))).bytes


def _contenders(op, place: Place) -> list[tuple[str, Kernel]]:
    """Every kernel of the op; the reference, which is torch's own (SDPA in attention), also through torch.compile: a
    graph for each case, so that nothing runs eagerly after too many of them."""
    known = [(kernel.backend, kernel) for kernel in registry.kernels(op.name)]
    if not place.tiny:
        torch._dynamo.reset()
        compiled = torch.compile(op.reference, dynamic=False)
        known.append((COMPILED, Kernel(op.name, COMPILED, compiled, differentiable=compiled)))
    return known


def _checks(op, kernel: Kernel, case, dtype, direction: str, device: str) -> list[verify.Check]:
    """By the rule; what is no backend of ours is compared by itself."""
    if direction == "fwd":
        return verify.forward(op, kernel, case, dtype, device)
    if kernel.backend != COMPILED:
        return verify.gradients(op, kernel, case, dtype, device)
    arguments = verify.bound(op, case.build(dtype, device, 0))
    names = [name for name, leaf in verify.named_leaves(arguments) if verify.differentiable(leaf)]
    got, plain = (verify.projected(run, arguments, 0) for run in (kernel.forward, op.reference))
    truth = verify.projected(op.reference, verify.widened(arguments), 0)
    largest = max([1.0, *(float(t.abs().max()) for t in truth if t.numel())])
    return verify.compare(names, got, plain, truth, dtype, 3.0, largest)


def _measure(op, kernel: Kernel, case, dtype, direction: str, place: Place) -> dict:
    nothing = {"ms": "", "TFLOP/s": "", "GB/s": "", "note": ""}
    try:
        arguments = verify.bound(op, case.build(dtype, place.device, 0))
        if reasons := kernel.why_not(op.request(arguments)):
            return nothing | {"note": "; ".join(reasons)}
        if kernel.backend != REFERENCE:
            wrong = [check for check in _checks(op, kernel, case, dtype, direction, place.device) if not check.ok]
            if wrong:
                return nothing | {"note": f"WRONG, not timed: {wrong[0]}"}
        call = _forward(kernel, arguments) if direction == "fwd" else _backward(op, kernel, arguments)
        with torch._dynamo.config.patch(**NOT_EAGER):
            took = place.milliseconds(call)
    except Exception as error:  # one op that fails must not cost the report on the others
        return nothing | {"note": f"failed: {type(error).__name__}: {str(error)[:300]}"}
    cost = op.cost(**arguments)
    rates = {"TFLOP/s": round(cost.flops / took / 1e9, 2), "GB/s": round(cost.bytes / took / 1e6, 1)}
    return nothing | {"ms": round(took, 4)} | (rates if direction == "fwd" else {})


def _forward(kernel: Kernel, arguments: dict) -> Callable:
    def call():
        with torch.inference_mode():
            return kernel.forward(*arguments.values())

    return call


def _backward(op, kernel: Kernel, arguments: dict) -> Callable:
    """The backward alone; the graph is kept between calls."""
    leaves = [value.requires_grad_() for value in arguments.values() if verify.differentiable(value)]
    outputs = registry.run_with_gradients(op, kernel, tuple(arguments.values()))
    outputs = [out for out in verify.outputs_of(outputs) if out.requires_grad]
    seeds = [torch.ones_like(out) for out in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, seeds, retain_graph=True, allow_unused=True)
