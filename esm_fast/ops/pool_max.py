"""pool_max: of each sequence's rows that count, the largest value of every column."""

import torch

from .common import AWKWARD_LENGTHS, Maker, accumulate_dtype, spans
from .contract import Contract, flags, floats, offsets
from .registry import Case, Cost, op

CONTRACT = Contract(x=floats("n", "width"), cu_seqlens=offsets("n"), counted=flags("n"))


def _case(name, lengths, width, *, ends=False) -> Case:
    """ends: whether <cls> and <eos> count; where they do not, they hold garbage that must not be read."""

    def build(dtype, device, seed):
        make = Maker(dtype, device, seed)
        x, cu_seqlens = make.residual(sum(lengths), width), make.cu_seqlens(lengths)
        counted = torch.ones(len(x), dtype=torch.bool, device=device)
        for start, end in spans(cu_seqlens):
            if not ends and end > start:
                counted[[start, end - 1]] = False
                x[[start, end - 1]] = float("nan")
        return dict(x=x, cu_seqlens=cu_seqlens, counted=counted)

    return Case(name, build)


def cases() -> list[Case]:
    ragged = [_case(name, lengths, 40, ends=name == "tiny") for name, lengths in AWKWARD_LENGTHS.items()]
    return [*ragged, _case("long", [1022], 20)]


def bench_cases() -> list[Case]:
    return [_case("4x512", [512] * 4, 1280)]


def cost(x, cu_seqlens, **_) -> Cost:
    return Cost(x.numel(), (x.numel() + (len(cu_seqlens) - 1) * x.shape[1]) * x.element_size())


def shapes(x, cu_seqlens, counted):
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1], dtype=accumulate_dtype(x.dtype))


@op(contract=CONTRACT, cases=cases, bench_cases=bench_cases, cost=cost, dtype_of="x", shapes=shapes)
def pool_max(x, cu_seqlens, counted):
    """The largest value of each column among a sequence's rows that count.

    Args:
        x: (n, width), the residual stream.
        cu_seqlens: (sequences + 1,) int32.
        counted: (n,) bool. Other rows are not read and get no gradient.

    Returns:
        (sequences, width) in fp32 (fp64 for fp64); NaN where one of them is, 0 for a sequence without such rows. A
        sequence's result does not depend on the others.
    """
    wide = x.to(accumulate_dtype(x.dtype))
    parts = [wide[start:end][counted[start:end]] for start, end in spans(cu_seqlens)]
    best = [part.amax(0) if len(part) else wide.new_zeros(x.shape[1]) for part in parts]
    return torch.stack(best) if best else wide.new_zeros(0, x.shape[1])
