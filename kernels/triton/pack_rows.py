"""pack_rows and unpack_rows: every row of the result is written once, by a program that looks up where it is from."""

import triton
import triton.language as tl

from .common import NAMES, implements, padded, spec
from .configs import Config

_COLUMNS = 256
_CONFIG = Config(dict(TILE=4), 4, 1)  # 8 elements a thread: 16 bytes of a half type, twice that of fp32


@triton.jit
def _copy(FROM, source, TO, target, read, write, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows `target` of TO become rows `source` of FROM, zeros where they are not read."""
    for first in range(0, WIDTH, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        inside = columns < WIDTH
        x = tl.load(FROM + (source[:, None] * WIDTH + columns), mask=read[:, None] & inside, other=0.0)
        tl.store(TO + (target[:, None] * WIDTH + columns), x, mask=write[:, None] & inside)


@triton.jit(do_not_specialize=["n"])
def take_rows(PADDED, ROWS, PACKED, n, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.load(ROWS + place, mask=place < n, other=0)
    _copy(PADDED, row, PACKED, place.to(tl.int64), place < n, place < n, WIDTH, COLUMNS)


@triton.jit(do_not_specialize=["n", "size", "steps"])
def spread_rows(
    PACKED, ROWS, PADDED, n, size, steps, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """ROWS increase, so that a row has at most as many before it as its number says, and at least as many as the number
    of the rows that are left out allows: where nothing is left out, nothing is searched."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    low, high = tl.maximum(row - (size - n), 0), tl.minimum(row, n)
    for _ in range(steps):
        middle = (low + high) // 2
        before = (low < high) & (tl.load(ROWS + middle, mask=low < high, other=0) < row)
        low, high = tl.where(before, middle + 1, low), tl.where(before, high, tl.minimum(middle, high))
    chosen = (row < size) & (low < n)
    chosen = chosen & (tl.load(ROWS + low, mask=chosen, other=-1) == row)
    _copy(PACKED, low.to(tl.int64), PADDED, row.to(tl.int64), chosen, row < size, WIDTH, COLUMNS)


def _launch(kernel, out, *arguments):
    """A program of `kernel` for every tile of rows of `out`."""
    rows, width = out.shape
    if out.numel():
        grid = (triton.cdiv(rows, _CONFIG.tiles["TILE"]),)
        kernel[grid](*arguments, width, _columns(width), **_CONFIG.launch)
    return out


def _columns(width: int) -> int:
    return min(_COLUMNS, padded(width))


def _backward_of_pack(arguments, kept, grad_outputs):
    padded, rows = arguments
    return unpack_rows(*grad_outputs, rows, len(padded)), None


def _backward_of_unpack(arguments, kept, grad_outputs):
    return pack_rows(*grad_outputs, arguments[1]), None, None


@implements("pack_rows", backward=_backward_of_pack)
def pack_rows(padded, rows):
    """See `esm_fast.ops.pack_rows`."""
    n = len(rows)
    out = padded.new_empty(n, padded.shape[1])
    return _launch(take_rows, out, padded.contiguous(), rows.contiguous(), out, n)


@implements("unpack_rows", backward=_backward_of_unpack)
def unpack_rows(packed, rows, size):
    """See `esm_fast.ops.unpack_rows`."""
    n = len(rows)
    out = packed.new_empty(size, packed.shape[1])
    steps = min(n, size - n).bit_length()
    return _launch(spread_rows, out, packed.contiguous(), rows.contiguous(), out, n, size, steps)


def compile_specs(capability: int) -> list:
    """ESM-1b's width, and that of its logits."""
    kernels = {take_rows: "*{0} *i64 *{0} i32", spread_rows: "*{0} *i64 *{0} i32 i32 i32"}
    return [
        spec(
            kernel,
            signature.format(name),
            dict(WIDTH=width, COLUMNS=_columns(width)),
            _CONFIG,
            direction="bwd" if kernel is take_rows else "fwd",
            dtype=dtype,
        )
        for dtype, name in NAMES.items()
        for width in (1280, 33)
        for kernel, signature in kernels.items()
    ]
