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
from .configs import Config, attention_config

_DELTA = Config(dict(ROWS=64), 4, 1)
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
    BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    start, length, first = _span(CU, tiles, BLOCK)
    if first >= length:
        return
    head = tl.program_id(1)
    base = start.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    rows = first + tl.arange(0, BLOCK)
    q = _load(Q + base, rows, length, HEADS, HEAD_DIM, DIM)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, DIM], tl.float32)
    for key in range(0, length, INNER):
        keys = key + tl.arange(0, INNER)
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


@triton.jit(do_not_specialize=["n"])
def attention_delta(
    OUT, GRAD, DELTA, n, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr
):
    """The inner product of each output row and its gradient, (heads, n), which the backward of every tile needs."""
    head = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    out = _load(OUT + head * HEAD_DIM, rows, n, HEADS, HEAD_DIM, DIM).to(tl.float32)
    grad = _load(GRAD + head * HEAD_DIM, rows, n, HEADS, HEAD_DIM, DIM).to(tl.float32)
    tl.store(DELTA + head.to(tl.int64) * n + rows, tl.sum(out * grad, 1), mask=rows < n)


@triton.jit
def _query_grad(
    Q, K, V, LSE, GRAD, DELTA, DQ, first, length, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    rows = first + tl.arange(0, BLOCK)
    q = _load(Q, rows, length, HEADS, HEAD_DIM, DIM)
    grad = _load(GRAD, rows, length, HEADS, HEAD_DIM, DIM)
    lse = tl.load(LSE + rows, mask=rows < length, other=0.0)
    delta = tl.load(DELTA + rows, mask=rows < length, other=0.0)
    dq = tl.zeros([BLOCK, DIM], tl.float32)
    for key in range(0, length, INNER):
        keys = key + tl.arange(0, INNER)
        k = _load(K, keys, length, HEADS, HEAD_DIM, DIM)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
        p = tl.where(keys[None, :] < length, tl.exp2(scores - lse[:, None]), 0.0)
        v = _load(V, keys, length, HEADS, HEAD_DIM, DIM)
        dscores = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    _store(DQ, dq * scale, rows, length, HEADS, HEAD_DIM, DIM)


@triton.jit
def _key_grads(
    Q, K, V, LSE, GRAD, DELTA, DK, DV, first, length, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Scores are transposed, (keys, queries), so that both products take them as they are."""
    keys = first + tl.arange(0, BLOCK)
    k = _load(K, keys, length, HEADS, HEAD_DIM, DIM)
    v = _load(V, keys, length, HEADS, HEAD_DIM, DIM)
    dk = tl.zeros([BLOCK, DIM], tl.float32)
    dv = tl.zeros([BLOCK, DIM], tl.float32)
    for query in range(0, length, INNER):
        rows = query + tl.arange(0, INNER)
        q = _load(Q, rows, length, HEADS, HEAD_DIM, DIM)
        lse = tl.load(LSE + rows, mask=rows < length, other=float("inf"))  # p = 0 beyond the end
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2E) - lse[None, :])
        grad = _load(GRAD, rows, length, HEADS, HEAD_DIM, DIM)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        delta = tl.load(DELTA + rows, mask=rows < length, other=0.0)
        dscores = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    _store(DK, dk * scale, keys, length, HEADS, HEAD_DIM, DIM)
    _store(DV, dv, keys, length, HEADS, HEAD_DIM, DIM)


@triton.jit(do_not_specialize=["n", "tiles"])
def attention_backward(
    Q, K, V, LSE, GRAD, DELTA, DQ, DK, DV, CU, n, tiles, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Of a tile of one head: dk and dv where the grid's second axis is even, dq where it is odd. One launch, so that
    both find the head's tensors in the L2 cache."""
    start, length, first = _span(CU, tiles, BLOCK)
    if first >= length:
        return
    head = tl.program_id(1) // 2
    base = start.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    line = head.to(tl.int64) * n + start
    Q, K, V, LSE, GRAD, DELTA = Q + base, K + base, V + base, LSE + line, GRAD + base, DELTA + line
    if tl.program_id(1) % 2 == 0:
        _key_grads(
            Q, K, V, LSE, GRAD, DELTA, DK + base, DV + base, first, length, scale,
            HEADS, HEAD_DIM, DIM, PRECISION, BLOCK, INNER,
        )  # fmt: skip
    else:
        _query_grad(
            Q, K, V, LSE, GRAD, DELTA, DQ + base, first, length, scale,
            HEADS, HEAD_DIM, DIM, PRECISION, BLOCK, INNER,
        )  # fmt: skip


def _launch(kernel, programs: int, tensors, cu_seqlens, max_seqlen, scale):
    """Runs a kernel over all tiles of every sequence, with so many programs each."""
    n, heads, head_dim = tensors[0].shape
    dim = padded(head_dim)
    config = attention_config(kernel.__name__, capability(tensors[0]), tensors[0].dtype, dim)
    tiles = triton.cdiv(max_seqlen, config.tiles["BLOCK"])
    grid = (tiles * (len(cu_seqlens) - 1), programs)
    kernel[grid](*tensors, cu_seqlens, n, tiles, scale, heads, head_dim, dim, precision(), **config.launch)


def attend(q, k, v, cu_seqlens, max_seqlen, scale):
    """(out, log-sum-exp) of contiguous q, k and v."""
    n, heads, _ = q.shape
    out, lse = torch.empty_like(q), q.new_empty(heads, n, dtype=torch.float32)
    _launch(attention_forward, heads, (q, k, v, out, lse), cu_seqlens, max_seqlen, scale)
    return out, lse


def attend_backward(q, k, v, out, lse, grad, cu_seqlens, max_seqlen, scale):
    """(dq, dk, dv), all arguments contiguous."""
    n, heads, head_dim = q.shape
    dq, dk, dv, delta = (torch.empty_like(tensor) for tensor in (q, k, v, lse))
    rows = (triton.cdiv(n, _DELTA.tiles["ROWS"]), heads)
    attention_delta[rows](out, grad, delta, n, heads, head_dim, padded(head_dim), **_DELTA.launch)
    _launch(attention_backward, 2 * heads, (q, k, v, lse, grad, delta, dq, dk, dv), cu_seqlens, max_seqlen, scale)
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
        attention_backward: ("bwd", "{0} {0} {0} *fp32 {0} *fp32 {0} {0} {0} *i32 i32 i32 fp32"),
    }
    sizes = [dict(HEADS=20, HEAD_DIM=head_dim, DIM=padded(head_dim)) for head_dim in (20, 64, 128)]
    products = [
        spec(
            kernel,
            signature.format(f"*{NAMES[dtype]}"),
            size | dict(PRECISION=how),
            attention_config(kernel.__name__, capability, dtype, size["DIM"]),
            direction=direction,
            dtype=dtype,
        )
        for dtype, how in PRECISIONS
        for size in sizes
        for kernel, (direction, signature) in types.items()
    ]
    deltas = [
        spec(attention_delta, f"*{name} *{name} *fp32 i32", size, _DELTA, direction="bwd", dtype=dtype)
        for dtype, name in NAMES.items()
        for size in sizes
    ]
    return products + deltas
