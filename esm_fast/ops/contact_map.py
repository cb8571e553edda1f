"""contact_map: one layer's share of the contact logits, streamed over its heads in O(T^2) memory.

The contact head (Rao et al. 2020) is a logistic regression over all attention maps A_c, each symmetrised, S = A + A^T,
and corrected by its average product, S - r r^T / t with r = S 1 and t = 1^T r. Its logit is linear in the maps:

    sum_c w_c S_c - sum_c w_c r_c r_c^T / t_c

so a layer adds its heads to one T x T sum; the 660 maps of ESM-1b never exist together.
"""

import torch

from .common import AWKWARD_LENGTHS, Maker, accumulate_dtype, spans
from .contract import Contract, alike, count, factor, flags, floats, longest, offsets
from .registry import Case, Cost, op


def _size_fits(known, cu_seqlens, size, **_):
    if cu_seqlens.device.type != "cpu":  # looking would mean waiting for the device
        return None
    needed = sum((end - start) ** 2 for start, end in spans(cu_seqlens))
    return None if size == needed else f"size must be {needed}, is {size}"


CONTRACT = Contract(
    _size_fits,
    q=alike("n", "heads", "head_dim"),
    k=alike("n", "heads", "head_dim"),
    cu_seqlens=offsets("n"),
    max_seqlen=longest(),
    size=count(most=2**62),
    keep=flags("n"),
    weight=floats("heads"),
    scale=factor(),
)


def _case(name, lengths, heads, head_dim) -> Case:
    def build(dtype, device, seed):
        make = Maker(dtype, device, seed)
        n = sum(lengths)
        cu_seqlens = make.cu_seqlens(lengths)
        keep = torch.ones(n, dtype=torch.bool, device=device)
        for start, end in spans(cu_seqlens):
            keep[start : start + 1] = False  # <cls>
            keep[max(start, end - 1) : end] = False  # <eos>
        q, k = (make.normal(n, heads, head_dim, scale=2.0) for _ in range(2))
        weight = make.normal(heads)
        sizes = dict(max_seqlen=max(lengths), size=sum(length**2 for length in lengths))
        return dict(q=q, k=k, cu_seqlens=cu_seqlens, **sizes, keep=keep, weight=weight, scale=head_dim**-0.5)

    return Case(name, build)


def cases() -> list[Case]:
    return [_case(name, lengths, 3, 16) for name, lengths in AWKWARD_LENGTHS.items()]


def bench_cases(head_dim: int = 64) -> list[Case]:
    return [_case("512", [512], 20, head_dim)]


def cost(q, k, cu_seqlens, max_seqlen, size, keep, weight, scale) -> Cost:
    return Cost(size * q.shape[1] * (2 * q.shape[2] + 8), 2 * q.numel() * q.element_size() + 4 * size)


def shapes(q, k, cu_seqlens, max_seqlen, size, keep, weight, scale):
    return q.new_empty(size, dtype=accumulate_dtype(q.dtype))


@op(contract=CONTRACT, cases=cases, bench_cases=bench_cases, cost=cost, dtype_of="q", shapes=shapes)
def contact_map(q, k, cu_seqlens, max_seqlen: int, size: int, keep, weight, scale: float):
    """One layer's contribution to the contact logits, bias not included.

    Args:
        q, k: (n, heads, head_dim) as `pre_ln_attention` returns them.
        cu_seqlens: (sequences + 1,) int32; max_seqlen: the longest sequence; size: the sum of all T^2. Given,
            so that no layer waits for a GPU to learn from the lengths how large its result is.
        keep: (n,) bool, false for the tokens that are no residues (<cls>, <eos>): they are attended to, but their rows
            and columns are left out of the maps.
        weight: (heads,), the regression's coefficients for this layer; scale: factor on q k^T.

    Returns:
        (size,) in fp32 (fp64): one T x T map per sequence, row-major, one after the other; 0 where not kept.
    """
    wide = accumulate_dtype(q.dtype)
    maps = [
        _sequence_map(q[start:end], k[start:end], keep[start:end], weight.to(wide), scale, wide).flatten()
        for start, end in spans(cu_seqlens)
    ]
    return torch.cat(maps) if maps else q.new_zeros(0, dtype=wide)


def _sequence_map(q, k, keep, weight, scale, wide):
    valid = keep.to(wide)
    total = torch.zeros(len(q), len(q), dtype=wide, device=q.device)
    if not bool(keep.any()):
        return total
    sums = []
    for head in range(q.shape[1]):
        scores = (q[:, head] * scale) @ k[:, head].T
        attention = scores.to(wide).softmax(-1) * valid[:, None] * valid
        sums.append(attention.sum(0) + attention.sum(1))
        total = total + weight[head] * attention
    row_sums = torch.stack(sums)  # (heads, T): r of each symmetrised map
    average_product = row_sums.T @ ((weight / row_sums.sum(1))[:, None] * row_sums)
    return total + total.T - average_product
