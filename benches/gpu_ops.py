"""Every op on every backend of a GPU, forward and backward, beside torch's own: verified, then timed."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from esm_fast.ops import OPS, registry, verify
from esm_fast.ops.registry import REFERENCE, Kernel

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
        memory = torch.cuda.get_device_properties(0).total_memory
        facts = {"compute capability": f"{major}.{minor}", "memory": f"{memory / 2**30:.0f} GiB",
                 "CUDA": str(torch.version.cuda)}  # fmt: skip
        return cls("cuda", tuple(DTYPES), 20, False, facts)

    @classmethod
    def dry(cls) -> "Place":
        return cls("cpu", ("fp32",), 1, True, {"device": "none: Triton's interpreter"})

    def milliseconds(self, call: Callable[[], object]) -> float:
        """The median of several calls after two for warming up."""
        if self.device == "cpu":
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        for _ in range(2):
            call()
        times = []
        for _ in range(self.calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)


def rows(place: Place) -> list[dict]:
    """One a backend, op, case, dtype and direction; what cannot run has its reasons in place of numbers."""
    found = []
    for op in OPS.values():
        cases = sorted(op.cases(), key=lambda case: _bytes(op, case))[:1] if place.tiny else op.bench_cases()
        for case in cases:
            for dtype in place.dtypes:
                for name, kernel in _contenders(op, place):
                    for direction in ("fwd", "bwd"):
                        about = dict(op=op.name, case=case.name, dtype=dtype, backend=name, direction=direction)
                        found.append(about | _measure(op, kernel, case, DTYPES[dtype], direction, place))
    return found


def _bytes(op, case) -> int:
    return op.cost(**verify.bound(op, case.build(torch.float32, "cpu", 0))).bytes


def _contenders(op, place: Place) -> list[tuple[str, Kernel]]:
    """Every kernel of the op; the reference, which is torch's own (SDPA in attention), also through torch.compile."""
    known = [(kernel.backend, kernel) for kernel in registry.kernels(op.name)]
    if not place.tiny:
        compiled = torch.compile(op.reference, dynamic=True)
        known.append(("torch.compile", Kernel(op.name, REFERENCE, compiled, differentiable=compiled)))
    return known


def _measure(op, kernel: Kernel, case, dtype, direction: str, place: Place) -> dict:
    nothing = {"ms": "", "TFLOP/s": "", "GB/s": "", "note": ""}
    try:
        arguments = verify.bound(op, case.build(dtype, place.device, 0))
        if reasons := kernel.why_not(op.request(arguments)):
            return nothing | {"note": "; ".join(reasons)}
        if kernel.backend != REFERENCE:
            rule = {"fwd": verify.forward, "bwd": verify.gradients}[direction]
            wrong = [check for check in rule(op, kernel, case, dtype, place.device) if not check.ok]
            if wrong:
                return nothing | {"note": f"WRONG, not timed: {wrong[0]}"}
        call = _forward(kernel, arguments) if direction == "fwd" else _backward(op, kernel, arguments)
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
