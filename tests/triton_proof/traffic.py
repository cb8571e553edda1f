"""Bytes that a call moves: by Triton kernels as the sanitizer counted them, and by torch's own ops around them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton_proof import sanitizer

from esm_fast.ops import verify
from esm_fast.ops.registry import Case, Kernel, Op, run_with_gradients


class Bytes(NamedTuple):
    """distinct: every address once per launch or torch op, what DRAM must move; requested: with every repetition, what
    L2 must serve; kernels: the Triton kernels that were launched."""

    distinct: int
    requested: int
    kernels: tuple[str, ...]


class _TorchTraffic(TorchDispatchMode):
    """Counts each torch op's tensors once; views and fresh memory cost nothing, nor do the interpreter's own copies."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if sanitizer.launching() or function.is_view:
            return result
        name = function.overloadpacket.__name__
        if "empty" not in name and name != "detach":
            self.bytes += sum(t.numel() * t.element_size() for t in _tensors([*args, *(kwargs or {}).values(), result]))
        return result


def _tensors(values) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for value in values:
        nested = value if isinstance(value, (tuple, list)) else (value,)
        found |= {id(t): t for t in nested if isinstance(t, torch.Tensor)}
    return list(found.values())


def measure(call: Callable[[], object]) -> Bytes:
    with sanitizer.recording() as launches, _TorchTraffic() as torch_ops:
        call()
    return Bytes(
        distinct=sum(launch.distinct for launch in launches) + torch_ops.bytes,
        requested=sum(launch.requested for launch in launches) + torch_ops.bytes,
        kernels=tuple(sorted({launch.kernel for launch in launches})),
    )


def of_case(op: Op, kernel: Kernel, case: Case, dtype: torch.dtype, direction: str) -> tuple[Bytes, int]:
    """What one case moves, and the least that the contract allows: by its cost; backwards, the inputs, the gradients
    that come in and the gradients that go out, once each."""
    arguments = verify.bound(op, case.build(dtype, "cpu", 0))
    if direction == "fwd":
        return measure(lambda: kernel.forward(*arguments.values())), op.cost(**arguments).bytes
    leaves = [value.requires_grad_() for value in arguments.values() if verify.differentiable(value)]
    outputs = verify.outputs_of(run_with_gradients(op, kernel, tuple(arguments.values())))
    outputs = [output for output in outputs if output.requires_grad]
    seeds = [torch.ones_like(output) for output in outputs]
    moved = measure(lambda: torch.autograd.grad(outputs, leaves, seeds, allow_unused=True))
    return moved, sum(t.numel() * t.element_size() for t in [*leaves, *leaves, *seeds])
