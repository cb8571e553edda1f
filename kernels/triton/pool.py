"""pool: the weighted sum of each sequence's rows, in the rows' order; rows of weight 0 are not read."""

import torch
import triton
import triton.language as tl

from .common import implements, padded, spec
from .configs import Config

_COLUMNS = 128
_POOL, _BACKWARD = Config(dict(ROWS=16), 4, 1), Config({}, 4, 1)


@triton.jit
def pool_rows(X, WEIGHT, CU, OUT, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """One program a sequence and a block of columns."""
    sequence = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(CU + sequence + 1)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(tl.load(CU + sequence), end, ROWS):
        row = first + tl.arange(0, ROWS)
        weight = tl.load(WEIGHT + row, mask=row < end, other=0.0).to(tl.float32)
        read = (weight != 0.0)[:, None] & (columns < WIDTH)[None, :]
        x = tl.load(X + row.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask=read, other=0.0).to(tl.float32)
        total += tl.sum(x * weight[:, None], 0)
    tl.store(OUT + sequence.to(tl.int64) * WIDTH + columns, total, mask=columns < WIDTH)


@triton.jit
def pool_backward(X, WEIGHT, OWNER, GRAD, DX, DWEIGHT, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    weight = tl.load(WEIGHT + row).to(tl.float32)
    read = columns < tl.where(weight != 0.0, WIDTH, 0)
    at = row.to(tl.int64) * WIDTH + columns
    grad = tl.load(GRAD + tl.load(OWNER + row) * WIDTH + columns, mask=read, other=0.0)
    tl.store(DX + at, (grad * weight).to(DX.dtype.element_ty), mask=columns < WIDTH)
    along = tl.sum(grad * tl.load(X + at, mask=read, other=0.0).to(tl.float32), 0)
    tl.store(DWEIGHT + row, along.to(DWEIGHT.dtype.element_ty))


def _backward(arguments, kept, grad_outputs):
    x, cu_seqlens, weight = (tensor.contiguous() for tensor in arguments)
    n, width = x.shape
    owner = torch.searchsorted(cu_seqlens, torch.arange(n, dtype=torch.int64, device=x.device), right=True) - 1
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    tensors = (x, weight, owner, grad_outputs[0].contiguous(), dx, dweight)
    pool_backward[(n,)](*tensors, width, padded(width), **_BACKWARD.launch)
    return dx, None, dweight


@implements("pool", backward=_backward)
def pool(x, cu_seqlens, weight):
    """See `esm_fast.ops.pool`."""
    x, cu_seqlens, weight = x.contiguous(), cu_seqlens.contiguous(), weight.contiguous()
    (_, width), sequences = x.shape, len(cu_seqlens) - 1
    out = torch.empty(sequences, width, dtype=torch.float32, device=x.device)
    columns = min(_COLUMNS, padded(width))
    grid = (sequences, triton.cdiv(width, columns))
    pool_rows[grid](x, weight, cu_seqlens, out, width, columns, **_POOL.launch)
    return out


def compile_specs(capability: int) -> list:
    """ESM-1b's width; the stream and its weights are fp32 whatever the model's dtype."""
    forward = spec(
        pool_rows,
        "*fp32 *fp32 *i32 *fp32",
        dict(WIDTH=1280, COLUMNS=_COLUMNS),
        _POOL,
        direction="fwd",
        dtype=torch.float32,
    )
    backward = spec(
        pool_backward,
        "*fp32 *fp32 *i64 *fp32 *fp32 *fp32",
        dict(WIDTH=1280, BLOCK=padded(1280)),
        _BACKWARD,
        direction="bwd",
        dtype=torch.float32,
    )
    return [forward, backward]
