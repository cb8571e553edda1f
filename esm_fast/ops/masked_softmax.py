"""masked_softmax: padded attention scores -> attention maps. Only where a caller wants the maps themselves.

The sums of the average-product correction are not made here but in `contact_map`, the only op that needs them: contacts
come from queries and keys even where the maps are returned beside them, so no stored map is ever read for them.
"""

import torch

from .common import Maker, accumulate_dtype
from .contract import Contract, floats, integers
from .registry import Case, Cost, op

CONTRACT = Contract(scores=floats("batch", "heads", "length", "length"), lengths=integers("batch"))


def _case(name, lengths, heads) -> Case:
    def build(dtype, device, seed):
        make = Maker(dtype, device, seed)
        scores = make.normal(len(lengths), heads, max(lengths), max(lengths), scale=4.0)
        return dict(scores=scores, lengths=torch.tensor(lengths, dtype=torch.int32, device=device))

    return Case(name, build)


def cases() -> list[Case]:
    return [_case("one", [1], 1), _case("full", [33, 33], 2), _case("ragged", [1, 31, 64, 2], 3)]


def bench_cases() -> list[Case]:
    return [_case("4x20x512", [512, 400, 300, 200], 20)]


def cost(scores, lengths) -> Cost:
    valid = scores.shape[1] * int(lengths.long().square().sum())  # padding need not be read
    wide = accumulate_dtype(scores.dtype).itemsize
    return Cost(5 * scores.numel(), valid * scores.element_size() + scores.numel() * wide)


@op(contract=CONTRACT, cases=cases, bench_cases=bench_cases, cost=cost, dtype_of="scores")
def masked_softmax(scores, lengths):
    """Row-wise softmax over the valid keys of each sequence.

    Args:
        scores: (batch, heads, T, T), already scaled.
        lengths: (batch,) integers; rows and columns from there on are padding.

    Returns:
        (batch, heads, T, T) in fp32 (fp64 for fp64); padded rows and columns are exactly 0.
    """
    valid = torch.arange(scores.shape[-1], dtype=torch.int64, device=scores.device) < lengths[:, None]
    scores = scores.to(accumulate_dtype(scores.dtype))
    weights = scores.masked_fill(~valid[:, None, None, :], float("-inf")).softmax(-1)
    return weights.masked_fill(~(valid[:, None, :, None] & valid[:, None, None, :]), 0.0)
