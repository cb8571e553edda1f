"""attention_varlen: flash attention (Dao 2023) over packed sequences, bidirectional; no scores are ever stored.

One program owns a tile of queries of one head of one sequence (of keys, for dk and dv) and walks over the other side of
that sequence alone; programs beyond a sequence's end return at once. Scores, the running softmax and all sums are fp32.
Tiles begin where the sequence begins, so a sequence's bits do not depend on its neighbours, and no two programs add to
one address, so gradients have the same bits in every run. That costs the backward seven products a tile where atomics
would need five.

Tensors are (n, heads, head_dim) without gaps; the log-sum-exp of every row, in base 2, is (heads, n) in fp32.
"""

import torch
import triton
import triton.language as tl

from .common import NAMES, PRECISIONS, capability, implements, padded, precision, spec
from .configs import attention_config

_LOG2E = tl.constexpr(1.4426950408889634)  # exponentials are of base 2


@triton.jit
def _span(CU, tiles, TILE: tl.constexpr):
    """This program's (first row of its sequence, the sequence's length, first row of its tile within it)."""
    sequence = tl.program_id(0) // tiles
    start = tl.load(CU + sequence)
    return start, tl.load(CU + sequence + 1) - start, tl.program_id(0) % tiles * TILE


@triton.jit
def _place(rows, length, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Offsets of rows of one head from the sequence's first, and which of them exist."""
    columns = tl.arange(0, DIM)[None, :]
    return rows[:, None] * (HEADS * HEAD_DIM) + columns, (rows[:, None] < length) & (columns < HEAD_DIM)


@triton.jit
def _load(P, rows, length, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    offsets, exist = _place(rows, length, HEADS, HEAD_DIM, DIM)
    return tl.load(P + offsets, mask=exist, other=0.0)


@triton.jit
def _store(P, values, rows, length, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    offsets, exist = _place(rows, length, HEADS, HEAD_DIM, DIM)
    tl.store(P + offsets, values.to(P.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["n", "tiles"])
def attention_forward(
    Q, K, V, OUT, LSE, CU, n, tiles, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    start, length, first = _span(CU, tiles, BLOCK_Q)
    if first >= length:
        return
    head = tl.program_id(1)
    base = start.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    rows = first + tl.arange(0, BLOCK_Q)
    q = _load(Q + base, rows, length, HEADS, HEAD_DIM, DIM)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, DIM], tl.float32)
    for key in range(0, length, BLOCK_K):
        keys = key + tl.arange(0, BLOCK_K)
        k = _load(K + base, keys, length, HEADS, HEAD_DIM, DIM)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
        scores = tl.where(keys[None, :] < length, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = _load(V + base, keys, length, HEADS, HEAD_DIM, DIM)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        top = higher
    _store(OUT + base, out / total[:, None], rows, length, HEADS, HEAD_DIM, DIM)
    tl.store(LSE + head.to(tl.int64) * n + start + rows, top + tl.log2(total), mask=rows < length)


@triton.jit(do_not_specialize=["n", "tiles"])
def attention_backward_q(
    Q, K, V, OUT, LSE, GRAD, DELTA, DQ, CU, n, tiles, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq; and delta, the inner product of each output row and its gradient, which dk and dv need as well."""
    start, length, first = _span(CU, tiles, BLOCK_Q)
    if first >= length:
        return
    head = tl.program_id(1)
    base = start.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    rows = first + tl.arange(0, BLOCK_Q)
    grad = _load(GRAD + base, rows, length, HEADS, HEAD_DIM, DIM)
    out = _load(OUT + base, rows, length, HEADS, HEAD_DIM, DIM)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    lines = head.to(tl.int64) * n + start + rows
    tl.store(DELTA + lines, delta, mask=rows < length)
    lse = tl.load(LSE + lines, mask=rows < length, other=0.0)
    q = _load(Q + base, rows, length, HEADS, HEAD_DIM, DIM)
    dq = tl.zeros([BLOCK_Q, DIM], tl.float32)
    for key in range(0, length, BLOCK_K):
        keys = key + tl.arange(0, BLOCK_K)
        k = _load(K + base, keys, length, HEADS, HEAD_DIM, DIM)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
        p = tl.where(keys[None, :] < length, tl.exp2(scores - lse[:, None]), 0.0)
        v = _load(V + base, keys, length, HEADS, HEAD_DIM, DIM)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        dscores = p * (dp - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    _store(DQ + base, dq * scale, rows, length, HEADS, HEAD_DIM, DIM)


@triton.jit(do_not_specialize=["n", "tiles"])
def attention_backward_kv(
    Q, K, V, LSE, GRAD, DELTA, DK, DV, CU, n, tiles, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv. Scores are transposed, (keys, queries), so that both products take them as they are."""
    start, length, first = _span(CU, tiles, BLOCK_K)
    if first >= length:
        return
    head = tl.program_id(1)
    base = start.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    line = head.to(tl.int64) * n + start
    keys = first + tl.arange(0, BLOCK_K)
    k = _load(K + base, keys, length, HEADS, HEAD_DIM, DIM)
    v = _load(V + base, keys, length, HEADS, HEAD_DIM, DIM)
    dk = tl.zeros([BLOCK_K, DIM], tl.float32)
    dv = tl.zeros([BLOCK_K, DIM], tl.float32)
    for query in range(0, length, BLOCK_Q):
        rows = query + tl.arange(0, BLOCK_Q)
        q = _load(Q + base, rows, length, HEADS, HEAD_DIM, DIM)
        lse = tl.load(LSE + line + rows, mask=rows < length, other=float("inf"))  # p = 0 beyond the end
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2E) - lse[None, :])
        grad = _load(GRAD + base, rows, length, HEADS, HEAD_DIM, DIM)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        delta = tl.load(DELTA + line + rows, mask=rows < length, other=0.0)
        dscores = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    _store(DK + base, dk * scale, keys, length, HEADS, HEAD_DIM, DIM)
    _store(DV + base, dv, keys, length, HEADS, HEAD_DIM, DIM)


def _launch(kernel, tiled, tensors, cu_seqlens, max_seqlen, scale):
    """Runs a kernel over all heads and all tiles of every sequence; `tiled` names the side that is cut into them."""
    n, heads, head_dim = tensors[0].shape
    config = attention_config(kernel.__name__, capability(tensors[0]), tensors[0].dtype, padded(head_dim))
    tiles = triton.cdiv(max_seqlen, config.tiles[tiled])
    grid = (tiles * (len(cu_seqlens) - 1), heads)
    shape = (heads, head_dim, padded(head_dim), precision())
    kernel[grid](*tensors, cu_seqlens, n, tiles, scale, *shape, **config.launch)


def attend(q, k, v, cu_seqlens, max_seqlen, scale):
    """(out, log-sum-exp) of contiguous q, k and v."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    _launch(attention_forward, "BLOCK_Q", (q, k, v, out, lse), cu_seqlens, max_seqlen, scale)
    return out, lse


def attend_backward(q, k, v, out, lse, grad, cu_seqlens, max_seqlen, scale):
    """(dq, dk, dv), all arguments contiguous."""
    dq, dk, dv, delta = (torch.empty_like(tensor) for tensor in (q, k, v, lse))
    _launch(attention_backward_q, "BLOCK_Q", (q, k, v, out, lse, grad, delta, dq), cu_seqlens, max_seqlen, scale)
    _launch(attention_backward_kv, "BLOCK_K", (q, k, v, lse, grad, delta, dk, dv), cu_seqlens, max_seqlen, scale)
    return dq, dk, dv


def _train(q, k, v, cu_seqlens, max_seqlen, scale):
    out, lse = attend(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens.contiguous(), max_seqlen, scale)
    return out, (out, lse)


def _backward(arguments, kept, grad_outputs):
    q, k, v, cu_seqlens, max_seqlen, scale = arguments
    tensors = (tensor.contiguous() for tensor in (q, k, v, *kept, *grad_outputs, cu_seqlens))
    return *attend_backward(*tensors, max_seqlen, scale), None, None, None


@implements("attention_varlen", backward=_backward, train=_train)
def attention_varlen(q, k, v, cu_seqlens, max_seqlen, scale):
    """See `esm_fast.ops.attention_varlen`."""
    return _train(q, k, v, cu_seqlens, max_seqlen, scale)[0]


def compile_specs(capability: int) -> list:
    """Heads of 64 as in ESM-1b, of a size that is no power of two, and of the largest."""
    types = {
        attention_forward: ("fwd", "{0} {0} {0} {0} *fp32 *i32 i32 i32 fp32"),
        attention_backward_q: ("bwd", "{0} {0} {0} {0} *fp32 {0} *fp32 {0} *i32 i32 i32 fp32"),
        attention_backward_kv: ("bwd", "{0} {0} {0} *fp32 {0} *fp32 {0} {0} *i32 i32 i32 fp32"),
    }
    return [
        spec(
            kernel,
            signature.format(f"*{NAMES[dtype]}"),
            dict(HEADS=20, HEAD_DIM=head_dim, DIM=padded(head_dim), PRECISION=how),
            attention_config(kernel.__name__, capability, dtype, padded(head_dim)),
            gemm=(dtype, how) != (torch.float32, "ieee"),
            direction=direction,
            dtype=dtype,
        )
        for dtype, how in PRECISIONS
        for head_dim in (20, 64, 128)
        for kernel, (direction, signature) in types.items()
    ]
