"""pre_ln_attention: LN, the three projections in one launch, rotary where asked for, flash attention over the packed
sequences, and the output projection with bias and the residual stream, which is added in fp32.

Training keeps q, k, v, the attention's output and its log-sum-exp; the normed stream is made again.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl

from esm_fast.ops.pre_ln_attention import pre_ln_attention as op

from .attention_varlen import attend, attend_backward
from .common import (
    NAMES,
    PRECISIONS,
    capability,
    implements,
    precision,
    require_one_dtype,
    spec,
)
from .configs import linear_config
from .layer_norm import layer_norm, layer_norm_grads
from .linear import add_bias, input_grads, linear_residual, place, product, rows_at, tile_of, tiles, weight_grads
from .rotary import rotary_grad, rotate

# The op's arguments by name, and in `_backward` their gradients.
Arguments = namedtuple("Arguments", op.signature.parameters, defaults=[None] * len(op.signature.parameters))


@triton.jit(do_not_specialize=["m"])
def qkv_projection(
    X, WQ, WK, WV, BQ, BK, BV, OUT, m, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One of q, k and v, by the second axis of the grid; OUT is (3, m, WIDTH)."""
    which = tl.program_id(1)
    W = WQ if which == 0 else (WK if which == 1 else WV)
    BIAS = BQ if which == 0 else (BK if which == 1 else BV)
    row, column = tile_of(tl.program_id(0), m, WIDTH, BLOCK_M, BLOCK_N)
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_at = rows_at(X, row, m, WIDTH, BLOCK_M, BLOCK_K)
    out = product(out, x_at, W, column, WIDTH, WIDTH, WIDTH, 1, BLOCK_N, BLOCK_K, PRECISION)
    out = add_bias(out, BIAS, column, WIDTH, BLOCK_N)
    at, exist = place(row, column, m, WIDTH, BLOCK_M, BLOCK_N)
    OUT += which.to(tl.int64) * m * WIDTH
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=exist)


def _project(normed, weights, biases):
    """q, k and v as (3, n, width)."""
    n, width = normed.shape
    config = linear_config("qkv_projection", capability(normed), normed.dtype)
    out = normed.new_empty(3, n, width)
    grid = (tiles(config, n, width), 3)
    qkv_projection[grid](normed, *weights, *biases, out, n, width, precision(), **config.launch)
    return out


def _given(values) -> Arguments:
    given = Arguments(*(value.contiguous() if isinstance(value, torch.Tensor) else value for value in values))
    require_one_dtype(given.q_weight, given.k_weight, given.v_weight, given.out_weight)
    return given


def _qkv(given: Arguments, normed):
    """q, k and v as (n, heads, head_dim), before any rotation."""
    weights = (given.q_weight, given.k_weight, given.v_weight)
    projected = _project(normed, weights, (given.q_bias, given.k_bias, given.v_bias))
    return projected.view(3, len(normed), given.heads, -1)


def _normed(given: Arguments):
    return layer_norm(given.x, given.ln_weight, given.ln_bias, given.eps, given.q_weight.dtype)


def _sequences(given: Arguments, head_dim: int):
    return given.cu_seqlens, given.max_seqlen, head_dim**-0.5


def _train(*values):
    given = _given(values)
    q, k, v = _qkv(given, _normed(given))
    if given.rotary is not None:
        rotate(q, k, given.rotary)
    mixed, lse = attend(q, k, v, *_sequences(given, q.shape[-1]))
    out = linear_residual(mixed.view(given.x.shape), given.out_weight, given.out_bias, given.x)
    return (out, q, k) if given.return_qk else out, (q, k, v, mixed, lse)


def _backward(arguments, kept, grad_outputs):
    given, (q, k, v, mixed, lse) = _given(arguments), kept
    stream_grad, *qk_grads = (grad.contiguous() for grad in grad_outputs)
    grad = stream_grad.to(given.out_weight.dtype)
    dout_weight, dout_bias = weight_grads(grad, mixed.view(grad.shape), given.out_bias)
    dmixed = (grad @ given.out_weight).view(q.shape)
    dq, dk, dv = attend_backward(q, k, v, mixed, lse, dmixed, *_sequences(given, q.shape[-1]))
    if given.return_qk:
        dq, dk = dq + qk_grads[0], dk + qk_grads[1]
    normed, dtables = _normed(given), None
    if given.rotary is not None:
        if given.rotary.requires_grad:
            dtables = rotary_grad(*_qkv(given, normed)[:2], dq, dk).to(given.rotary.dtype)
        rotate(dq, dk, given.rotary, back=True)
    dq, dk, dv = (d.view(grad.shape) for d in (dq, dk, dv))
    dq_weight, dq_bias = weight_grads(dq, normed, given.q_bias)
    dk_weight, dk_bias = weight_grads(dk, normed, given.k_bias)
    dv_weight, dv_bias = weight_grads(dv, normed, given.v_bias)
    dnormed = input_grads((dq, dk, dv), (given.q_weight, given.k_weight, given.v_weight), dq.dtype)
    dx, dgain, dbias = layer_norm_grads(given.x, given.ln_weight, dnormed, stream_grad, given.eps)
    return Arguments(
        x=dx,
        ln_weight=dgain,
        ln_bias=dbias,
        q_weight=dq_weight,
        q_bias=dq_bias,
        k_weight=dk_weight,
        k_bias=dk_bias,
        v_weight=dv_weight,
        v_bias=dv_bias,
        out_weight=dout_weight,
        out_bias=dout_bias,
        rotary=dtables,
    )


@implements("pre_ln_attention", backward=_backward, train=_train)
def pre_ln_attention(*values):
    """See `esm_fast.ops.pre_ln_attention`."""
    return _train(*values)[0]


def compile_specs(capability: int) -> list:
    """ESM-1b's width; the rest is in `layer_norm`, `rotary`, `attention_varlen` and `linear`."""
    return [
        spec(
            qkv_projection,
            "*{0} *{0} *{0} *{0} *{0} *{0} *{0} *{0} i32".format(NAMES[dtype]),
            dict(WIDTH=1280, PRECISION=how),
            linear_config("qkv_projection", capability, dtype),
            direction="fwd",
            dtype=dtype,
        )
        for dtype, how in PRECISIONS
    ]
