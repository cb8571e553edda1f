"""pool_moments: the weighted mean and variance of each sequence's rows, column by column."""

import torch

from .common import accumulate_dtype, spans
from .contract import Contract, floats, offsets
from .pool import bench_cases as pool_bench_cases
from .pool import cases as pool_cases
from .registry import Case, Cost, op

CONTRACT = Contract(x=floats("n", "width"), cu_seqlens=offsets("n"), weight=floats("n"))


def _case(of_pool: Case) -> Case:
    """With weights that are not negative, and columns far from 0, where the variance is a small part of the square."""

    def build(dtype, device, seed):
        arguments = of_pool.build(dtype, device, seed)
        return arguments | dict(x=arguments["x"] + 30, weight=arguments["weight"].abs())

    return Case(of_pool.name, build)


def cases() -> list[Case]:
    return [_case(case) for case in pool_cases()]


def bench_cases() -> list[Case]:
    return [_case(case) for case in pool_bench_cases()]


def cost(x, cu_seqlens, **_) -> Cost:
    return Cost(5 * x.numel(), (x.numel() + 2 * (len(cu_seqlens) - 1) * x.shape[1]) * x.element_size())


def shapes(x, cu_seqlens, weight):
    return x.new_empty(cu_seqlens.shape[0] - 1, 2, x.shape[1], dtype=accumulate_dtype(x.dtype))


@op(contract=CONTRACT, cases=cases, bench_cases=bench_cases, cost=cost, dtype_of="x", shapes=shapes)
def pool_moments(x, cu_seqlens, weight):
    """Mean m = sum(w x) / sum(w) and variance sum(w (x - m)^2) / sum(w) of each column of a sequence's rows.

    Two passes: the squares are those of deviations from the mean, so nothing cancels (Chan et al. 1983, who also tell
    how the moments of parts join).

    Args:
        x: (n, width), the residual stream.
        cu_seqlens: (sequences + 1,) int32.
        weight: (n,), 0 or more. Rows of weight 0 are not read, and neither they nor their weight get a gradient.

    Returns:
        (sequences, 2, width), mean and variance, in fp32 (fp64 for fp64); 0 for a sequence without weight. A sequence's
        result does not depend on the others.
    """
    wide = accumulate_dtype(x.dtype)
    weight = weight.to(wide)[:, None]
    rows = x.to(wide).masked_fill(weight == 0, 0.0)
    parts = [_moments(rows[start:end], weight[start:end]) for start, end in spans(cu_seqlens)]
    return torch.stack(parts) if parts else rows.new_zeros(0, 2, x.shape[1])


def _moments(rows, weight):
    total = weight.sum()
    total = total.masked_fill(total == 0, 1.0)
    mean = (rows * weight).sum(0) / total
    return torch.stack([mean, ((rows - mean).square() * weight).sum(0) / total])
