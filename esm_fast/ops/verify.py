"""Does a kernel compute its op? The rule every backend is held to, in tests and before every benchmark.

truth = the reference in fp64, plain = the reference in the tested dtype, got = the kernel. The kernel's largest error
may be twice the plain one's (three times for gradients), its root-mean-square error one and a half times, plus a floor
of a few roundings of the values' own scale. So the tolerance follows from the arithmetic, not from taste.
"""

from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from .registry import Case, Kernel, Op

NOTHING = 1e-12  # of the largest gradient: one below it is zero, and fp64 itself computes roundings of it
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


class Check(NamedTuple):
    """One output (or gradient): its name, and its errors as shares of what is allowed; at most 1 passes."""

    name: str
    largest: float
    rms: float

    @property
    def ok(self) -> bool:
        return self.largest <= 1 and self.rms <= 1


def forward(op: Op, kernel: Kernel, case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> list[Check]:
    """Compares every floating-point output of a kernel on one case."""
    arguments = bound(op, case.build(dtype, device, seed))
    got = outputs_of(kernel.forward(*arguments.values()))
    plain = outputs_of(op.reference(**arguments))
    truth = outputs_of(op.reference(**widened(arguments)))
    return compare([f"output {i}" for i in range(len(got))], got, plain, truth, dtype, 2.0)


def gradients(op: Op, kernel: Kernel, case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> list[Check]:
    """Compares the gradient of a random projection of the outputs, for every floating-point input."""
    arguments = bound(op, case.build(dtype, device, seed))
    names = [name for name, leaf in named_leaves(arguments) if differentiable(leaf)]

    def through(run, values) -> list[torch.Tensor]:
        values = pytree.tree_map(lambda v: v.detach().requires_grad_() if differentiable(v) else v, values)
        inputs = [leaf for _, leaf in named_leaves(values) if differentiable(leaf)]
        outputs = outputs_of(run(values))
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu") for out in outputs]
        seeds = [draw.to(out) for draw, out in zip(drawn, outputs, strict=True)]
        pairs = [(out, seed) for out, seed in zip(outputs, seeds, strict=True) if out.requires_grad]
        if not pairs:  # no output depends on any input
            return [torch.zeros_like(leaf) for leaf in inputs]
        outputs, seeds = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(inputs, found, strict=True)]

    got = through(lambda values: op(**values, backend=kernel.backend), arguments)
    plain = through(lambda values: op.reference(**values), arguments)
    truth = through(lambda values: op.reference(**values), widened(arguments))
    largest = max([1.0, *(float(t.abs().max()) for t in truth if t.numel())])  # 1: what comes in from above
    return compare([f"gradient of {name}" for name in names], got, plain, truth, dtype, 3.0, largest)


def compare(names, got, plain, truth, dtype, factor, largest=0.0) -> list[Check]:
    """The rule itself, for lists of tensors; factor: how often the plain one's largest error is allowed.

    largest: of all gradients, the outputs' too. Where terms of that size cancel to nothing, as in that of k's bias,
    their sum's own scale is no measure: a few fp32 roundings remain, which luck may spare the plain one."""
    checks = []
    for name, g, p, t in zip(names, got, plain, truth, strict=True):
        if g.shape != t.shape:
            raise AssertionError(f"{name} has shape {tuple(g.shape)}, the reference {tuple(t.shape)}")
        if not t.numel():
            continue
        wrong, unavoidable = (g.double() - t).abs(), (p.double() - t).abs()
        floor, rms_floor = FLOOR[dtype] * t.abs().max(), FLOOR[dtype] * _rms(t)
        if t.abs().max() < NOTHING * largest:
            floor = rms_floor = FLOOR[torch.float32] * largest
        allowed, allowed_rms = factor * unavoidable.max() + floor, 1.5 * _rms(unavoidable) + rms_floor
        checks.append(Check(name, _share(wrong.max(), allowed), _share(_rms(wrong), allowed_rms)))
    return checks


def _share(wrong: torch.Tensor, allowed: torch.Tensor) -> float:
    """wrong / allowed, where exact agreement is fine even if nothing is allowed; NaN counts as infinitely wrong."""
    if not bool(torch.isfinite(wrong)):
        return float("inf")
    return 0.0 if wrong == 0 else float(wrong / allowed)


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().mean().sqrt()


def bound(op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
    filled = op.bind((), arguments)
    op.check(**filled)
    return filled


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """In fp64, tensors inside sequences too."""
    return pytree.tree_map(lambda leaf: leaf.double() if differentiable(leaf) else leaf, arguments)


def named_leaves(arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    """("x", tensor), ("layers[0].fc1_weight", tensor), ...: the arguments and what sequences among them hold."""
    leaves, _ = pytree.tree_flatten_with_path(arguments)
    return [(path[0].key + pytree.keystr(path[1:]), leaf) for path, leaf in leaves]


def differentiable(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def outputs_of(outputs) -> list[torch.Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [out for out in outputs if out is not None]
