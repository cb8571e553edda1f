"""What contact_map and its gradient share: a tile of an attention map, and where each sequence's map begins."""

import torch
import triton
import triton.language as tl

from .attention_varlen import _LOG2E, _load


@triton.jit
def attention_tile(
    Q, K, rows, keys, lse, length, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of an attention map, (rows, keys); lse is infinite for rows that do not exist."""
    q = _load(Q, rows, length, HEADS, HEAD_DIM, DIM)
    k = _load(K, keys, length, HEADS, HEAD_DIM, DIM)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
    return tl.where(keys[None, :] < length, tl.exp2(scores - lse[:, None]), 0.0)


def starts_of(cu_seqlens) -> torch.Tensor:
    """Where each sequence's map begins."""
    squares = cu_seqlens.diff().long().square()
    return squares.cumsum(0) - squares
