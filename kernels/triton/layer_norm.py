"""Layer norm of the residual stream, forward and backward; a program owns whole rows, statistics are fp32.

Its own kernel rather than a part of the product behind it. Folded into that product, either every tile of columns
would read the fp32 stream again, twice the bytes of the normed one, and keep it from the asynchronous copies tensor
cores live on; or the stream would be rounded to half before its mean is taken away, and ESM-1b's has channels hundreds
of times larger than the rest. The pass costs 6 bytes an element, a tenth of the time of the projections that follow.
"""

import torch
import triton
import triton.language as tl

from .common import NAMES, padded, spec
from .configs import Config

_TILE = 4096
_CHUNK = 32  # rows a program of the backward sums up for the gradients of gain and bias
_CONFIG = Config({}, 8, 1)


@triton.jit
def _normed(X, row, columns, n, eps, WIDTH: tl.constexpr):
    """(rows minus their mean times 1 / deviation, 1 / deviation, where they are, which elements exist)."""
    exist = (row[:, None] < n) & (columns[None, :] < WIDTH)
    at = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    x = tl.load(X + at, mask=exist, other=0.0).to(tl.float32)
    centred = tl.where(exist, x - tl.sum(x, 1)[:, None] / WIDTH, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)[:, None]
    return centred * rstd, rstd, at, exist


@triton.jit
def _vector(P, columns, WIDTH: tl.constexpr):
    return tl.load(P + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["n"])
def layer_norm_forward(X, GAIN, BIAS, OUT, n, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    normed, rstd, at, exist = _normed(X, row, columns, n, eps, WIDTH)
    out = normed * _vector(GAIN, columns, WIDTH) + _vector(BIAS, columns, WIDTH)
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["n"])
def layer_norm_backward(
    X, GAIN, DOUT, GRAD, DX, DGAIN, DBIAS, n, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dx on top of the stream's own gradient, and this program's share of the gradients of gain and bias."""
    columns = tl.arange(0, BLOCK)
    gain = _vector(GAIN, columns, WIDTH)
    dgain, dbias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, CHUNK, ROWS):
        row = tl.program_id(0) * CHUNK + first + tl.arange(0, ROWS)
        normed, rstd, at, exist = _normed(X, row, columns, n, eps, WIDTH)
        dout = tl.load(DOUT + at, mask=exist, other=0.0).to(tl.float32)
        dgain += tl.sum(dout * normed, 0)
        dbias += tl.sum(dout, 0)
        dnormed = dout * gain
        along = tl.sum(dnormed * normed, 1)[:, None] / WIDTH
        dx = (dnormed - tl.sum(dnormed, 1)[:, None] / WIDTH - normed * along) * rstd
        dx += tl.load(GRAD + at, mask=exist, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=exist)
    share = tl.program_id(0) * WIDTH + columns
    tl.store(DGAIN + share, dgain, mask=columns < WIDTH)
    tl.store(DBIAS + share, dbias, mask=columns < WIDTH)


def _blocks(width: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile."""
    block = padded(width)
    return max(1, min(_TILE // block, _CHUNK)), block


def layer_norm(x, weight, bias, eps, dtype):
    """LN(x) in `dtype`; x contiguous."""
    n, width = x.shape
    out = torch.empty_like(x, dtype=dtype)
    rows, block = _blocks(width)
    grid = (triton.cdiv(n, rows),)
    layer_norm_forward[grid](x, weight, bias, out, n, eps, width, rows, block, **_CONFIG.launch)
    return out


def layer_norm_grads(x, weight, dout, grad, eps):
    """(dx, dweight, dbias) for the gradient `dout` of LN(x), dx on top of `grad`; contiguous tensors."""
    n, width = x.shape
    programs = triton.cdiv(n, _CHUNK)
    dx = torch.empty_like(x)
    dgain, dbias = torch.empty(2, programs, width, dtype=torch.float32, device=x.device)
    rows, block = _blocks(width)
    tensors = (x, weight, dout, grad, dx, dgain, dbias)
    layer_norm_backward[(programs,)](*tensors, n, eps, width, rows, block, _CHUNK, **_CONFIG.launch)
    return dx, dgain.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype)


def compile_specs(capability: int) -> list:
    """ESM-1b's width, for weights of every dtype; the table is the same everywhere. The gradient of what was normed has
    the weights' dtype where it comes from a product, and is fp32 in the embedding."""
    rows, block = _blocks(1280)
    tile = dict(WIDTH=1280, ROWS=rows, BLOCK=block)
    ways = (
        (layer_norm_forward, "fwd", "*fp32 *{0} *{0} *{0} i32 fp32", tile),
        (layer_norm_backward, "bwd", "*fp32 *{0} *{0} *fp32 *fp32 *fp32 *fp32 i32 fp32", {**tile, "CHUNK": _CHUNK}),
        (layer_norm_backward, "bwd", "*fp32 *{0} *fp32 *fp32 *fp32 *fp32 *fp32 i32 fp32", {**tile, "CHUNK": _CHUNK}),
    )
    return [
        spec(kernel, types.format(name), shape, _CONFIG, direction=direction, dtype=dtype)
        for dtype, name in NAMES.items()
        for kernel, direction, types, shape in ways
    ]
