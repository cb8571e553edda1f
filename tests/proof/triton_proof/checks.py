"""What a kernel must pass in the interpreter: the tolerance rule inside guarded memory, and poisoned neighbours."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from esm_fast.alphabet import MASK
from esm_fast.ops import verify
from esm_fast.ops.common import spans
from esm_fast.ops.registry import Case, Kernel, Op, run_with_gradients


class Share(NamedTuple):
    """One part of a batch, which nothing outside it may touch: its elements of some arguments, and of each output."""

    inputs: dict[str, Any]
    outputs: list[Any]


def _sequence(arguments: dict, *names: str, outputs: int = 1) -> Share:
    """The rows of the middle one of the sequences that have more than one."""
    candidates = [slice(a, b) for a, b in spans(arguments["cu_seqlens"]) if b - a > 1]
    rows = candidates[len(candidates) // 2]
    return Share(dict.fromkeys(names, rows), [rows] * outputs)


def _map_of_a_sequence(arguments: dict) -> Share:
    share = _sequence(arguments, "q", "k", "keep")
    rows = share.inputs["q"]
    before = sum((b - a) ** 2 for a, b in spans(arguments["cu_seqlens"]) if b <= rows.start)
    return Share(share.inputs, [slice(before, before + (rows.stop - rows.start) ** 2)])


def _one_sum(arguments: dict) -> Share:
    share = _sequence(arguments, "x", "weight")
    which = [a for a, b in spans(arguments["cu_seqlens"])].index(share.inputs["x"].start)
    return Share(share.inputs, [which])


def _valid_scores(arguments: dict) -> Share:
    """Of the first padded batch element, what is not padding."""
    lengths = arguments["lengths"].tolist()
    which = next(i for i, n in enumerate(lengths) if 1 < n < max(lengths))
    valid = (which, slice(None), slice(lengths[which]), slice(lengths[which]))
    return Share({"scores": valid}, [valid])


def _chosen_rows(arguments: dict) -> Share:
    rows = arguments["rows"]
    return Share({"x": slice(3, 5) if rows is None else rows}, [slice(3, 5), ...] if rows is None else [..., ...])


def _packed_rows(arguments: dict) -> Share:
    return Share({"packed": slice(3, 5)}, [arguments["rows"][3:5]])


def _padded_rows(arguments: dict) -> Share:
    return Share({"padded": arguments["rows"][3:5]}, [slice(3, 5)])


SHARES: dict[str, Callable[[dict], Share]] = {
    "attention_varlen": lambda arguments: _sequence(arguments, "q", "k", "v"),
    "contact_map": _map_of_a_sequence,
    "embedding": lambda arguments: _sequence(arguments, "tokens"),
    "gelu_ffn": lambda arguments: Share({"x": slice(3, 5)}, [slice(3, 5)]),
    "masked_lm_head": _chosen_rows,
    "masked_softmax": _valid_scores,
    "pack_rows": _padded_rows,
    "pool": _one_sum,
    "pre_ln_attention": lambda arguments: _sequence(arguments, "x"),
    "unpack_rows": _packed_rows,
}


def neighbours_are_left_alone(op: Op, kernel: Kernel, case: Case, dtype: torch.dtype, share_of, *, grad: bool) -> None:
    """Asserts that a share's outputs and gradients keep every bit when everything outside it is poison."""
    arguments = verify.bound(op, verify.guarded(case).build(dtype, "cpu", 0))
    share = share_of(arguments)
    poisoned = dict(arguments)
    for name, own in share.inputs.items():
        # An absurd token would be an error of the caller's; a neighbour of <mask> tokens alone has an infinite scale.
        value = MASK if name == "tokens" else verify.poison(arguments[name].dtype)
        poisoned[name] = _poison_outside(arguments[name], own, value)
    clean, dirty = (_run(op, kernel, values, share, grad, outside) for values, outside in
                    ((arguments, 0.0), (poisoned, float("nan"))))  # fmt: skip
    for what in clean:
        assert torch.isfinite(clean[what]).all(), f"{what} of the share is not finite even in clean company"
        assert torch.equal(clean[what], dirty[what]), f"{what} of the share depends on its neighbours"


def _poison_outside(tensor: torch.Tensor, own, value) -> torch.Tensor:
    outside = torch.full_like(tensor, value)
    outside[own] = tensor[own]
    return outside


def _run(op: Op, kernel: Kernel, arguments: dict, share: Share, grad: bool, outside: float) -> dict[str, torch.Tensor]:
    """The share's outputs; with grad also the gradients of its inputs, upstream ones being `outside` elsewhere."""
    leaves = {n: arguments[n].detach().requires_grad_(grad and verify.differentiable(arguments[n])) for n in arguments
              if isinstance(arguments[n], torch.Tensor)}  # fmt: skip
    values = tuple({**arguments, **leaves}.values())
    outputs = verify.outputs_of(run_with_gradients(op, kernel, values) if grad else kernel.forward(*values))
    found = {f"output {i}": out.detach()[own] for i, (out, own) in enumerate(zip(outputs, share.outputs, strict=True))}
    if not grad:
        return found
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
    seeds = [_poison_outside(s, own, outside) for s, own in zip(seeds, share.outputs, strict=True)]
    names = [name for name in share.inputs if leaves[name].requires_grad]
    if names:
        gradients = torch.autograd.grad(outputs, [leaves[name] for name in names], seeds)
        found |= {f"gradient of {n}": g[share.inputs[n]] for n, g in zip(names, gradients, strict=True)}
    return found
