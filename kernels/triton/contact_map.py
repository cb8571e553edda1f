"""contact_map: a layer's contact logits, streamed over heads; no attention map is ever stored.

Four passes, none of which adds atomically: the log-sum-exp of every row; each symmetrised map's row sums; what the
average product is divided by; and the tiles of the result, each with its mirror image, summed over the heads in
registers. Recomputing the scores costs five products where a stored map would need one, and 4 bytes a contact of memory
where the maps of a layer would need 80.

Sums and logits are fp32. Rows are counted from their sequence's first, so a map's bits do not depend on its neighbours.
"""

import torch
import triton
import triton.language as tl

from .attention_varlen import _LOG2E, _load, _span
from .common import NAMES, PRECISIONS, capability, implements, padded, precision, spec
from .configs import Config
from .contact_map_backward import contact_grads
from .contact_tiles import attention_tile, starts_of


@triton.jit(do_not_specialize=["n", "tiles"])
def contact_lse(
    Q, K, LSE, CU, n, tiles, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LSE (heads, n), in base 2."""
    start, length, first = _span(CU, tiles, BLOCK)
    if first >= length:
        return
    head = tl.program_id(1)
    base = start.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    rows = first + tl.arange(0, BLOCK)
    q = _load(Q + base, rows, length, HEADS, HEAD_DIM, DIM)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for key in range(0, length, BLOCK):
        keys = key + tl.arange(0, BLOCK)
        k = _load(K + base, keys, length, HEADS, HEAD_DIM, DIM)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
        scores = tl.where(keys[None, :] < length, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        top = higher
    tl.store(LSE + head.to(tl.int64) * n + start + rows, top + tl.log2(total), mask=rows < length)


@triton.jit(do_not_specialize=["n", "tiles"])
def contact_sums(
    Q, K, LSE, KEEP, SUMS, CU, n, tiles, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SUMS (heads, n): over the kept rows and columns of each map plus its mirror image; 0 where not kept."""
    start, length, first = _span(CU, tiles, BLOCK)
    if first >= length:
        return
    head = tl.program_id(1)
    base = start.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    line = head.to(tl.int64) * n + start
    mine = first + tl.arange(0, BLOCK)
    lse_mine = tl.load(LSE + line + mine, mask=mine < length, other=float("inf"))
    total = tl.zeros([BLOCK], tl.float32)
    for other in range(0, length, BLOCK):
        yours = other + tl.arange(0, BLOCK)
        lse_yours = tl.load(LSE + line + yours, mask=yours < length, other=float("inf"))
        kept = tl.load(KEEP + start + yours, mask=yours < length, other=0).to(tl.float32)
        rows = attention_tile(Q + base, K + base, mine, yours, lse_mine, length, scale, HEADS, HEAD_DIM, DIM, PRECISION)
        total += tl.sum(rows * kept[None, :], 1)
        columns = attention_tile(
            Q + base, K + base, yours, mine, lse_yours, length, scale, HEADS, HEAD_DIM, DIM, PRECISION
        )
        total += tl.sum(columns * kept[:, None], 0)
    kept = tl.load(KEEP + start + mine, mask=mine < length, other=0).to(tl.float32)
    tl.store(SUMS + line + mine, total * kept, mask=mine < length)


@triton.jit(do_not_specialize=["n"])
def contact_shares(SUMS, WEIGHT, SHARES, CU, n, TILE: tl.constexpr):
    """SHARES (heads, sequences): the weight over the sum of the whole map; 0 for a map without residues."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(CU + sequence), tl.load(CU + sequence + 1)
    total = tl.zeros([TILE], tl.float32)
    for first in range(start, end, TILE):
        rows = first + tl.arange(0, TILE)
        total += tl.load(SUMS + head.to(tl.int64) * n + rows, mask=rows < end, other=0.0)
    whole = tl.sum(total, 0)
    share = tl.load(WEIGHT + head).to(tl.float32) / tl.where(whole > 0, whole, float("inf"))
    tl.store(SHARES + head * tl.num_programs(0) + sequence, share)


@triton.jit(do_not_specialize=["n", "tiles", "sequences"])
def contact_tiles(
    Q, K, LSE, SUMS, SHARES, WEIGHT, KEEP, OUT, STARTS, CU, n, tiles, sequences, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile on or above the diagonal of one sequence's map, and its mirror image."""
    start, length, top = _span(CU, tiles, BLOCK)
    left = tl.program_id(1) * BLOCK
    if (left < top) | (left >= length):
        return
    sequence = tl.program_id(0) // tiles
    rows, columns = top + tl.arange(0, BLOCK), left + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for head in range(HEADS):
        base = start.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM
        line = tl.cast(head, tl.int64) * n + start
        lse_rows = tl.load(LSE + line + rows, mask=rows < length, other=float("inf"))
        lse_columns = tl.load(LSE + line + columns, mask=columns < length, other=float("inf"))
        there = attention_tile(
            Q + base, K + base, rows, columns, lse_rows, length, scale, HEADS, HEAD_DIM, DIM, PRECISION
        )
        back = attention_tile(
            Q + base, K + base, columns, rows, lse_columns, length, scale, HEADS, HEAD_DIM, DIM, PRECISION
        )
        total += tl.load(WEIGHT + head).to(tl.float32) * (there + tl.trans(back))
        sums_rows = tl.load(SUMS + line + rows, mask=rows < length, other=0.0)
        sums_columns = tl.load(SUMS + line + columns, mask=columns < length, other=0.0)
        share = tl.load(SHARES + head * sequences + sequence)
        total -= share * sums_rows[:, None] * sums_columns[None, :]
    keep_rows = tl.load(KEEP + start + rows, mask=rows < length, other=0)
    keep_columns = tl.load(KEEP + start + columns, mask=columns < length, other=0)
    total = tl.where((keep_rows != 0)[:, None] & (keep_columns != 0)[None, :], total, 0.0)
    exist = (rows < length)[:, None] & (columns < length)[None, :]
    place = OUT + tl.load(STARTS + sequence)
    wide = length.to(tl.int64)
    tl.store(place + rows[:, None] * wide + columns[None, :], total, mask=exist)
    if left > top:
        tl.store(place + columns[:, None] * wide + rows[None, :], tl.trans(total), mask=tl.trans(exist))


def contact_config(capability: int, dtype: torch.dtype, dim: int) -> Config:
    """Tiles of 64 are the smallest that wgmma (sm_90) and tcgen05 (sm_100) multiply; elsewhere they would spill."""
    if dtype == torch.float32:
        return Config(dict(BLOCK=32), 8, 2)
    return Config(dict(BLOCK=64), 8, 2) if capability in (90, 100) and dim <= 64 else Config(dict(BLOCK=32), 4, 2)


_SHARES = Config(dict(TILE=1024), 4, 1)


def _train(q, k, cu_seqlens, max_seqlen, size, keep, weight, scale):
    q, k, cu_seqlens, keep, weight = _prepared(q, k, cu_seqlens, keep, weight)
    n, heads, head_dim = q.shape
    sequences = len(cu_seqlens) - 1
    config = contact_config(capability(q), q.dtype, padded(head_dim))
    starts, tiles = starts_of(cu_seqlens), triton.cdiv(max_seqlen, config.tiles["BLOCK"])
    lse, sums = torch.empty(2, heads, n, dtype=torch.float32, device=q.device)
    shares, out = lse.new_empty(heads, sequences), lse.new_empty(size)
    shape = (heads, head_dim, padded(head_dim), precision())
    rows = (tiles * sequences, heads)
    contact_lse[rows](q, k, lse, cu_seqlens, n, tiles, scale, *shape, **config.launch)
    contact_sums[rows](q, k, lse, keep, sums, cu_seqlens, n, tiles, scale, *shape, **config.launch)
    contact_shares[(sequences, heads)](sums, weight, shares, cu_seqlens, n, **_SHARES.launch)
    tensors = (q, k, lse, sums, shares, weight, keep, out, starts, cu_seqlens)
    contact_tiles[(tiles * sequences, tiles)](*tensors, n, tiles, sequences, scale, *shape, **config.launch)
    return out, (lse, sums)


def _prepared(q, k, cu_seqlens, keep, weight):
    q, k, cu_seqlens, keep, weight = (tensor.contiguous() for tensor in (q, k, cu_seqlens, keep, weight))
    return q, k, cu_seqlens, keep.view(torch.uint8), weight


def _backward(arguments, kept, grad_outputs):
    q, k, cu_seqlens, max_seqlen, _, keep, weight, scale = arguments
    tensors = _prepared(q, k, cu_seqlens, keep, weight)
    dq, dk, dweight = contact_grads(*tensors, max_seqlen, scale, *kept, grad_outputs[0].contiguous())
    return dq, dk, None, None, None, None, dweight, None


@implements("contact_map", backward=_backward, train=_train)
def contact_map(*arguments):
    """See `esm_fast.ops.contact_map`."""
    return _train(*arguments)[0]


def compile_specs(capability: int) -> list:
    """Heads of 64 as in ESM-1b, in every dtype."""
    tiled = {
        contact_lse: "{0} {0} *fp32 *i32 i32 i32 fp32",
        contact_sums: "{0} {0} *fp32 *u8 *fp32 *i32 i32 i32 fp32",
        contact_tiles: "{0} {0} *fp32 *fp32 *fp32 {0} *u8 *fp32 *i64 *i32 i32 i32 i32 fp32",
    }
    products = [
        spec(
            kernel,
            signature.format(f"*{NAMES[dtype]}"),
            dict(HEADS=20, HEAD_DIM=64, DIM=64, PRECISION=how),
            contact_config(capability, dtype, 64),
            direction="fwd",
            dtype=dtype,
        )
        for dtype, how in PRECISIONS
        for kernel, signature in tiled.items()
    ]
    shares = [
        spec(contact_shares, f"*fp32 *{name} *fp32 *i32 i32", {}, _SHARES, direction="fwd", dtype=dtype)
        for dtype, name in NAMES.items()
    ]
    return products + shares
