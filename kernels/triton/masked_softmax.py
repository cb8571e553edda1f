"""masked_softmax: padded attention scores to attention maps; all arithmetic in fp32.

A program owns as many whole rows as fit into _TILE elements, or one. A row of up to _LONGEST columns is read once and
kept in registers; of a longer one, the rest is read twice, the first time for the largest score and the sum. Padding is
never read, and 0 is written there.
"""

import torch
import triton
import triton.language as tl

from .common import NAMES, implements, padded, spec
from .configs import Config

_TILE, _LONGEST = 1024, 4096  # four elements a thread leave room for many blocks on an SM, and so for many loads
_CONFIG = Config({}, 8, 1)


@triton.jit
def _rows(LENGTHS, heads, t, rows, ROWS: tl.constexpr):
    """(where this program's rows begin, their offsets from there, their widths, their valid widths), of a
    (batch, heads, t, t) tensor; 0 wide is no row. Offsets within a program are 32-bit, which saves registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = tl.where(row < rows, t, 0)
    length = tl.load(LENGTHS + row // t // heads, mask=row < rows, other=0).to(tl.int32)
    valid = tl.where(row % t < length, length, 0)
    first = (tl.program_id(0) * ROWS).to(tl.int64) * t
    return first, tl.arange(0, ROWS)[:, None] * t, width[:, None], valid[:, None]


@triton.jit
def _load(P, start, columns, valid, other: tl.constexpr):
    return tl.load(P + (start + columns), mask=columns < valid, other=other).to(tl.float32)


@triton.jit
def _store(P, start, columns, width, values):
    tl.store(P + (start + columns), values.to(P.dtype.element_ty), mask=columns < width)


@triton.jit(do_not_specialize=["heads", "t", "rows"])
def masked_softmax_forward(SCORES, LENGTHS, OUT, heads, t, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    base, start, width, valid = _rows(LENGTHS, heads, t, rows, ROWS)
    SCORES, OUT = SCORES + base, OUT + base
    longest = tl.max(valid)
    columns = tl.arange(0, BLOCK)[None, :]
    scores = _load(SCORES, start, columns, valid, float("-inf"))
    top = tl.max(scores, 1)[:, None]
    for first in range(BLOCK, longest, BLOCK):
        scores_there = _load(SCORES, start, first + columns, valid, float("-inf"))
        top = tl.maximum(top, tl.max(scores_there, 1)[:, None])
    top = tl.where(valid > 0, top, 0.0)
    weights = tl.exp(scores - top)
    total = tl.sum(weights, 1)[:, None]
    for first in range(BLOCK, longest, BLOCK):
        scores_there = _load(SCORES, start, first + columns, valid, float("-inf"))
        total += tl.sum(tl.exp(scores_there - top), 1)[:, None]
    share = 1.0 / tl.where(valid > 0, total, 1.0)
    _store(OUT, start, columns, width, weights * share)
    for first in range(BLOCK, t, BLOCK):
        scores_there = _load(SCORES, start, first + columns, valid, float("-inf"))
        _store(OUT, start, first + columns, width, tl.exp(scores_there - top) * share)


@triton.jit(do_not_specialize=["heads", "t", "rows"])
def masked_softmax_backward(OUT, LENGTHS, GRAD, DSCORES, heads, t, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    base, start, width, valid = _rows(LENGTHS, heads, t, rows, ROWS)
    OUT, GRAD, DSCORES = OUT + base, GRAD + base, DSCORES + base
    columns = tl.arange(0, BLOCK)[None, :]
    out, grad = _load(OUT, start, columns, valid, 0.0), _load(GRAD, start, columns, valid, 0.0)
    inner = tl.sum(out * grad, 1)[:, None]
    for first in range(BLOCK, tl.max(valid), BLOCK):
        there = first + columns
        product = _load(OUT, start, there, valid, 0.0) * _load(GRAD, start, there, valid, 0.0)
        inner += tl.sum(product, 1)[:, None]
    _store(DSCORES, start, columns, width, out * (grad - inner))
    for first in range(BLOCK, t, BLOCK):
        there = first + columns
        out, grad = _load(OUT, start, there, valid, 0.0), _load(GRAD, start, there, valid, 0.0)
        _store(DSCORES, start, there, width, out * (grad - inner))


def _rows_of(block: int) -> int:
    return max(1, _TILE // block)


def _launch(kernel, *tensors):
    batch, heads, t, _ = tensors[0].shape
    rows, block = batch * heads * t, min(padded(t), _LONGEST)
    tile = _rows_of(block)
    tensors = (tensor.contiguous() for tensor in tensors)
    kernel[(triton.cdiv(rows, tile),)](*tensors, heads, t, rows, tile, block, **_CONFIG.launch)


def _backward(arguments, kept, grad_outputs):
    scores, lengths = arguments
    dscores = torch.empty_like(scores, memory_format=torch.contiguous_format)
    _launch(masked_softmax_backward, *kept, lengths, *grad_outputs, dscores)
    return dscores, None


@implements("masked_softmax", backward=_backward)
def masked_softmax(scores, lengths):
    """See `esm_fast.ops.masked_softmax`."""
    out = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    _launch(masked_softmax_forward, scores, lengths, out)
    return out


def compile_specs(capability: int) -> list:
    """Rows of every length up to 1,024, the longest of ESM-1b, and in several pieces; the table is the same everywhere.
    Lengths are 64-bit, as a model makes them."""
    types = {
        masked_softmax_forward: ("fwd", "*{0} *i64 *fp32 i32 i32 i32"),
        masked_softmax_backward: ("bwd", "*fp32 *i64 *fp32 *{0} i32 i32 i32"),
    }
    return [
        spec(
            kernel,
            signature.format(name),
            dict(ROWS=_rows_of(block), BLOCK=block),
            _CONFIG,
            direction=direction,
            dtype=dtype,
        )
        for dtype, name in NAMES.items()
        for block in (16, 32, 64, 128, 256, 512, 1024, _LONGEST)
        for kernel, (direction, signature) in types.items()
    ]
