"""Does a kernel compute its op? The rule every backend is held to, in tests and before every benchmark.

truth = the reference in fp64, plain = the reference in the tested dtype, got = the kernel. The kernel's largest error
may be twice the plain one's (three times for gradients), its root-mean-square error one and a half times, plus a floor
of a few roundings of the values' own scale. So the tolerance follows from the arithmetic, not from taste.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from .registry import Case, Kernel, Op

NOTHING = 1e-12  # of the largest gradient: one below it is zero, and fp64 itself computes roundings of it
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
GUARD = 64  # elements around a tensor that no kernel may let into a result: a multiple of every alignment


class Check(NamedTuple):
    """One output (or gradient): its name, and its errors as shares of what is allowed; at most 1 passes."""

    name: str
    largest: float
    rms: float

    @property
    def ok(self) -> bool:
        return self.largest <= 1 and self.rms <= 1


def guarded(case: Case) -> Case:
    """The case with every tensor in the middle of memory that is NaN, or the largest integer."""

    def build(dtype, device, seed):
        return pytree.tree_map_only(torch.Tensor, _in_guards, case.build(dtype, device, seed))

    return Case(case.name, build)


def _in_guards(value: torch.Tensor) -> torch.Tensor:
    wide = torch.full((value.numel() + 2 * GUARD,), poison(value.dtype), dtype=value.dtype, device=value.device)
    return wide[GUARD : GUARD + value.numel()].view(value.shape).copy_(value)


def poison(dtype: torch.dtype):
    """A value that no right result can come from."""
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def forward(op: Op, kernel: Kernel, case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> list[Check]:
    """Compares every floating-point output of a kernel on one case."""
    arguments = bound(op, case.build(dtype, device, seed))
    got = outputs_of(kernel.forward(*arguments.values()))
    plain = outputs_of(op.reference(**arguments))
    truth = outputs_of(op.reference(**widened(arguments)))
    return compare([f"output {i}" for i in range(len(got))], got, plain, truth, dtype, 2.0)


def gradients(
    op: Op, kernel: Kernel, case: Case, dtype: torch.dtype, device: str, seed: int = 0, draws: int = 1
) -> list[Check]:
    """Compares the gradient of a random projection of the outputs, for every floating-point input.

    draws: inputs by which the plain error is estimated: the case's own and others, drawn as it was. The largest of
    few roundings is a matter of luck, and with one draw of a small case that of the reference would be the verdict.
    """
    arguments = bound(op, case.build(dtype, device, seed))
    names = [f"gradient of {name}" for name, leaf in named_leaves(arguments) if differentiable(leaf)]
    got = projected(partial(op, backend=kernel.backend), arguments, seed)
    runs = []
    for number in range(seed, seed + draws):
        values = bound(op, case.build(dtype, device, number))
        runs.append([projected(op.reference, of, number) for of in (values, widened(values))])
    (plain, truth), *others = runs
    largest = max([1.0, *(float(t.abs().max()) for t in truth if t.numel())])  # 1: what comes in from above
    return compare(names, got, plain, truth, dtype, 3.0, largest, others)


def projected(run, values, seed: int) -> list[torch.Tensor]:
    """The gradients of a random projection of what `run` gives."""
    values = pytree.tree_map(lambda v: v.detach().requires_grad_() if differentiable(v) else v, values)
    inputs = [leaf for _, leaf in named_leaves(values) if differentiable(leaf)]
    outputs = outputs_of(run(**values))
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu") for out in outputs]
    seeds = [draw.to(out) for draw, out in zip(drawn, outputs, strict=True)]
    pairs = [(out, seed) for out, seed in zip(outputs, seeds, strict=True) if out.requires_grad]
    if not pairs:  # no output depends on any input
        return [torch.zeros_like(leaf) for leaf in inputs]
    outputs, seeds = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(inputs, found, strict=True)]


def compare(names, got, plain, truth, dtype, factor, largest=0.0, others=()) -> list[Check]:
    """The rule itself, for lists of tensors; factor: how often the plain one's largest error is allowed.

    largest: of all gradients, the outputs' too. Where terms of that size cancel to nothing, as in that of k's bias,
    their sum's own scale is no measure: a few fp32 roundings remain, which luck may spare the plain one.
    others: (plain, truth) of other draws, whose errors count as the plain one's do, as shares of their scale."""
    checks = []
    pairs = [zip(*run, strict=True) for run in others]
    for name, g, p, t, *drawn in zip(names, got, plain, truth, *pairs, strict=True):
        if g.shape != t.shape:
            raise AssertionError(f"{name} has shape {tuple(g.shape)}, the reference {tuple(t.shape)}")
        if not t.numel():
            continue
        wrong, scale = (g.double() - t).abs(), t.abs().max()
        unavoidable = [(p.double() - t).abs()]
        unavoidable += [(p2.double() - t2).abs() * (scale / t2.abs().max()) for p2, t2 in drawn if t2.any()]
        floor, rms_floor = FLOOR[dtype] * scale, FLOOR[dtype] * _rms(t)
        if scale < NOTHING * largest:
            floor = rms_floor = FLOOR[torch.float32] * largest
        allowed = factor * max(error.max() for error in unavoidable) + floor
        allowed_rms = 1.5 * max(map(_rms, unavoidable)) + rms_floor
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
