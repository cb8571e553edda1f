"""pool: a weighted sum of each sequence's rows. The weights make it the mean, <cls>, or a window's share."""

import torch

from .common import AWKWARD_LENGTHS, Maker, accumulate_dtype, spans
from .contract import Contract, floats, offsets
from .registry import Case, Cost, op

CONTRACT = Contract(x=floats("n", "width"), cu_seqlens=offsets("n"), weight=floats("n"))


def _case(name, lengths, width, *, ends=False) -> Case:
    """ends: whether <cls> and <eos> count; where they do not, they hold garbage that must not be read."""

    def build(dtype, device, seed):
        make = Maker(dtype, device, seed)
        x, cu_seqlens = make.residual(sum(lengths), width), make.cu_seqlens(lengths)
        weight = make.normal(sum(lengths), dtype=accumulate_dtype(dtype))
        for start, end in spans(cu_seqlens):
            if not ends and end > start:
                weight[[start, end - 1]] = 0
                x[[start, end - 1]] = float("nan")
        return dict(x=x, cu_seqlens=cu_seqlens, weight=weight)

    return Case(name, build)


def cases() -> list[Case]:
    ragged = [_case(name, lengths, 40, ends=name == "tiny") for name, lengths in AWKWARD_LENGTHS.items()]
    return [*ragged, _case("long", [1022], 20)]


def bench_cases() -> list[Case]:
    return [_case("4x512", [512] * 4, 1280)]


def cost(x, cu_seqlens, **_) -> Cost:
    return Cost(2 * x.numel(), (x.numel() + (len(cu_seqlens) - 1) * x.shape[1]) * x.element_size())


def shapes(x, cu_seqlens, weight):
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1], dtype=accumulate_dtype(x.dtype))


@op(contract=CONTRACT, cases=cases, bench_cases=bench_cases, cost=cost, dtype_of="x", shapes=shapes)
def pool(x, cu_seqlens, weight):
    """The weighted sum of each sequence's rows: with 1 / residues, and 0 on <cls> and <eos>, the mean over residues.

    Args:
        x: (n, width), the residual stream.
        cu_seqlens: (sequences + 1,) int32.
        weight: (n,), a row's share. Rows of weight 0 are not read, and neither they nor their weight get a gradient.

    Returns:
        (sequences, width) in fp32 (fp64 for fp64); 0 for a sequence without rows. A sequence's result does not depend
        on the others.
    """
    wide = accumulate_dtype(x.dtype)
    weight = weight.to(wide)[:, None]
    rows = x.to(wide).masked_fill(weight == 0, 0.0) * weight
    sums = [rows[start:end].sum(0) for start, end in spans(cu_seqlens)]
    return torch.stack(sums) if sums else rows.new_zeros(0, x.shape[1])
