"""The gradient of contact_map, on the same tiles as its forward pass, again without a stored map.

With g the gradient of the logits plus its mirror image, r a map's row sums, t their sum, w the head's weight:

    a map's gradient      w g_ij + e_i + e_j, where e = (w (r . g r) / (2 t) - w g r) / t
    the weight's gradient sum g_ij A_ij - (r . g r) / (2 t)

from where it continues through the softmax as in attention. Only kept rows and columns take part.
"""

import torch
import triton
import triton.language as tl

from .attention_varlen import _load, _span, _store
from .common import NAMES, PRECISIONS, capability, padded, precision, spec
from .configs import Config
from .contact_tiles import attention_tile, starts_of
from .gather import scatter_sum


@triton.jit
def _both_ways(GRAD, KEEP, rows, columns, length):
    """g of a tile; 0 where a row or column is not kept."""
    keep_rows = tl.load(KEEP + rows, mask=rows < length, other=0)
    keep_columns = tl.load(KEEP + columns, mask=columns < length, other=0)
    kept = (keep_rows != 0)[:, None] & (keep_columns != 0)[None, :]
    wide = length.to(tl.int64)
    there = tl.load(GRAD + rows[:, None] * wide + columns[None, :], mask=kept, other=0.0)
    back = tl.load(GRAD + columns[None, :] * wide + rows[:, None], mask=kept, other=0.0)
    return there + back, kept


@triton.jit(do_not_specialize=["n", "tiles"])
def contact_backward_sums(
    GRAD, SUMS, KEEP, OUT, STARTS, CU, n, tiles,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT = g r, (heads, n), all heads at once."""
    start, length, first = _span(CU, tiles, BLOCK)
    if first >= length:
        return
    grad = GRAD + tl.load(STARTS + tl.program_id(0) // tiles)
    rows, head = first + tl.arange(0, BLOCK), tl.arange(0, HEADS_PADDED)
    line = head.to(tl.int64) * n + start
    total = tl.zeros([BLOCK, HEADS_PADDED], tl.float32)
    for other in range(0, length, BLOCK):
        columns = other + tl.arange(0, BLOCK)
        g, _ = _both_ways(grad, KEEP + start, rows, columns, length)
        exist = (columns < length)[:, None] & (head < HEADS)[None, :]
        sums = tl.load(SUMS + line[None, :] + columns[:, None], mask=exist, other=0.0)
        total = tl.dot(g, sums, total, input_precision="ieee")
    exist = (rows < length)[:, None] & (head < HEADS)[None, :]
    tl.store(OUT + line[None, :] + rows[:, None], total, mask=exist)


@triton.jit
def _map_grad(GRAD, KEEP, rows, columns, e_rows, e_columns, weight, length):
    """(the gradient of a tile of an attention map, g)."""
    g, kept = _both_ways(GRAD, KEEP, rows, columns, length)
    return tl.where(kept, weight * g + e_rows[:, None] + e_columns[None, :], 0.0), g


@triton.jit(do_not_specialize=["n", "tiles"])
def contact_backward_q(
    Q, K, LSE, E, WEIGHT, GRAD, KEEP, DQ, DELTA, ALONG, STARTS, CU, n, tiles, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dq; each row's inner product of map and gradient, which dk needs as well; and of map and g, for the weight."""
    start, length, first = _span(CU, tiles, BLOCK)
    if first >= length:
        return
    head = tl.program_id(1)
    base = start.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    line = head.to(tl.int64) * n + start
    grad = GRAD + tl.load(STARTS + tl.program_id(0) // tiles)
    weight = tl.load(WEIGHT + head).to(tl.float32)
    rows = first + tl.arange(0, BLOCK)
    lse = tl.load(LSE + line + rows, mask=rows < length, other=float("inf"))
    e_rows = tl.load(E + line + rows, mask=rows < length, other=0.0)
    delta, along = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for key in range(0, length, BLOCK):
        keys = key + tl.arange(0, BLOCK)
        p = attention_tile(Q + base, K + base, rows, keys, lse, length, scale, HEADS, HEAD_DIM, DIM, PRECISION)
        e_keys = tl.load(E + line + keys, mask=keys < length, other=0.0)
        dp, g = _map_grad(grad, KEEP + start, rows, keys, e_rows, e_keys, weight, length)
        delta += tl.sum(p * dp, 1)
        along += tl.sum(p * g, 1)
    tl.store(DELTA + line + rows, delta, mask=rows < length)
    tl.store(ALONG + line + rows, along, mask=rows < length)
    dq = tl.zeros([BLOCK, DIM], tl.float32)
    for key in range(0, length, BLOCK):
        keys = key + tl.arange(0, BLOCK)
        p = attention_tile(Q + base, K + base, rows, keys, lse, length, scale, HEADS, HEAD_DIM, DIM, PRECISION)
        e_keys = tl.load(E + line + keys, mask=keys < length, other=0.0)
        dp, _ = _map_grad(grad, KEEP + start, rows, keys, e_rows, e_keys, weight, length)
        k = _load(K + base, keys, length, HEADS, HEAD_DIM, DIM)
        dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision=PRECISION)
    _store(DQ + base, dq * scale, rows, length, HEADS, HEAD_DIM, DIM)


@triton.jit(do_not_specialize=["n", "tiles"])
def contact_backward_k(
    Q, K, LSE, E, WEIGHT, GRAD, KEEP, DELTA, DK, STARTS, CU, n, tiles, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, length, first = _span(CU, tiles, BLOCK)
    if first >= length:
        return
    head = tl.program_id(1)
    base = start.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    line = head.to(tl.int64) * n + start
    grad = GRAD + tl.load(STARTS + tl.program_id(0) // tiles)
    weight = tl.load(WEIGHT + head).to(tl.float32)
    keys = first + tl.arange(0, BLOCK)
    e_keys = tl.load(E + line + keys, mask=keys < length, other=0.0)
    dk = tl.zeros([BLOCK, DIM], tl.float32)
    for query in range(0, length, BLOCK):
        rows = query + tl.arange(0, BLOCK)
        lse = tl.load(LSE + line + rows, mask=rows < length, other=float("inf"))
        p = attention_tile(Q + base, K + base, rows, keys, lse, length, scale, HEADS, HEAD_DIM, DIM, PRECISION)
        e_rows = tl.load(E + line + rows, mask=rows < length, other=0.0)
        dp, _ = _map_grad(grad, KEEP + start, rows, keys, e_rows, e_keys, weight, length)
        delta = tl.load(DELTA + line + rows, mask=rows < length, other=0.0)
        q = _load(Q + base, rows, length, HEADS, HEAD_DIM, DIM)
        dk = tl.dot(tl.trans(p * (dp - delta[:, None])).to(q.dtype), q, dk, input_precision=PRECISION)
    _store(DK + base, dk * scale, keys, length, HEADS, HEAD_DIM, DIM)


def backward_config(capability: int, dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        return Config(dict(BLOCK=32), 8, 2)
    return Config(dict(BLOCK=64), 8, 2) if capability in (90, 100) else Config(dict(BLOCK=32), 4, 2)


_SUMS = Config(dict(BLOCK=32), 4, 2)


def contact_grads(q, k, cu_seqlens, keep, weight, max_seqlen, scale, lse, sums, grad):
    """(dq, dk, dweight), everything contiguous."""
    n, heads, head_dim = q.shape
    config = backward_config(capability(q), q.dtype)
    starts, tiles = starts_of(cu_seqlens), triton.cdiv(max_seqlen, config.tiles["BLOCK"])
    sequences = len(cu_seqlens) - 1
    gr = torch.empty_like(sums)
    sums_tiles = triton.cdiv(max_seqlen, _SUMS.tiles["BLOCK"])
    contact_backward_sums[(sums_tiles * sequences,)](
        grad, sums, keep, gr, starts, cu_seqlens, n, sums_tiles, heads, padded(heads), **_SUMS.launch
    )
    e, whole, crossed = _of_the_average_product(cu_seqlens, weight.float(), sums, gr)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    delta, along = torch.empty_like(lse), torch.empty_like(lse)
    shape = (heads, head_dim, padded(head_dim), precision())
    grid = (tiles * sequences, heads)
    ends = (starts, cu_seqlens, n, tiles, scale)
    contact_backward_q[grid](q, k, lse, e, weight, grad, keep, dq, delta, along, *ends, *shape, **config.launch)
    contact_backward_k[grid](q, k, lse, e, weight, grad, keep, delta, dk, *ends, *shape, **config.launch)
    dweight = along.sum(1) - (crossed * whole / 2).sum(0)
    return dq, dk, dweight.to(weight.dtype)


def _of_the_average_product(cu_seqlens, weight, sums, gr):
    """e (heads, n); and per sequence and head, 1 / t (0 without residues) and r . g r."""
    owner = (
        torch.searchsorted(cu_seqlens, torch.arange(sums.shape[1], dtype=torch.int64, device=sums.device), right=True)
        - 1
    )
    sequences = len(cu_seqlens) - 1
    t, crossed = (scatter_sum(x.T.contiguous(), owner, sequences, x.dtype) for x in (sums, sums * gr))
    whole = torch.where(t > 0, 1 / t, 0.0)
    e = weight * (crossed * whole / 2)[owner] * whole[owner] - weight * whole[owner] * gr.T
    return e.T.contiguous(), whole, crossed


def compile_specs(capability: int) -> list:
    """Heads of 64 as in ESM-1b, in every dtype."""
    tiled = {
        contact_backward_q: "{0} {0} *fp32 *fp32 {0} *fp32 *u8 {0} *fp32 *fp32 *i64 *i32 i32 i32 fp32",
        contact_backward_k: "{0} {0} *fp32 *fp32 {0} *fp32 *u8 *fp32 {0} *i64 *i32 i32 i32 fp32",
    }
    products = [
        spec(
            kernel,
            signature.format(f"*{NAMES[dtype]}"),
            dict(HEADS=20, HEAD_DIM=64, DIM=64, PRECISION=how),
            backward_config(capability, dtype),
            direction="bwd",
            dtype=dtype,
        )
        for dtype, how in PRECISIONS
        for kernel, signature in tiled.items()
    ]
    sums = spec(
        contact_backward_sums,
        "*fp32 *fp32 *u8 *fp32 *i64 *i32 i32 i32",
        dict(HEADS=20, HEADS_PADDED=32),
        _SUMS,
        direction="bwd",
        dtype=torch.float32,
    )
    return [*products, sums]
