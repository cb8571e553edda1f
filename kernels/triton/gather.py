"""Sums of rows that share an index, the gradient of a gather, without atomics: sorted once, summed in one order."""

import torch
import triton
import triton.language as tl

from .common import NAMES, padded, spec
from .configs import Config

_CONFIG = Config(dict(ROWS=16), 4, 1)
_COLUMNS = 128


@triton.jit
def sum_rows(
    X, ORDER, SCALE, ENDS, OUT,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """OUT[i] = the sum over j in [ENDS[i], ENDS[i + 1]) of X[ORDER[j]] * SCALE[ORDER[j]], one program a row and a
    block of columns."""
    group = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(ENDS + group + 1)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(tl.load(ENDS + group), end, ROWS):
        place = first + tl.arange(0, ROWS)
        row = tl.load(ORDER + place, mask=place < end, other=0).to(tl.int64)
        exist = (place < end)[:, None] & (columns < WIDTH)[None, :]
        x = tl.load(X + row[:, None] * WIDTH + columns[None, :], mask=exist, other=0.0).to(tl.float32)
        if SCALED:
            x *= tl.load(SCALE + row, mask=place < end, other=0.0)[:, None]
        total += tl.sum(x, 0)
    tl.store(OUT + group.to(tl.int64) * WIDTH + columns, total.to(OUT.dtype.element_ty), mask=columns < WIDTH)


def _columns(width: int) -> int:
    return min(_COLUMNS, padded(width))


def scatter_sum(x, index, groups: int, dtype, scale=None):
    """(groups, width): for each group the sum of the rows of x (n, width) with that index, times their scale."""
    place, order = torch.sort(index, stable=True)
    ends = torch.searchsorted(place, torch.arange(groups + 1, device=x.device, dtype=place.dtype))
    width = x.shape[1]
    out = x.new_empty(groups, width, dtype=dtype)
    columns = _columns(width)
    grid = (groups, triton.cdiv(width, columns))
    scaled = scale is not None
    sum_rows[grid](x, order, scale if scaled else x, ends, out, width, columns, scaled, **_CONFIG.launch)
    return out


def compile_specs(capability: int) -> list:
    """ESM-1b's sizes: of the embedding's tables, in their dtype, with a scale and without; of the rows that the
    language model's head picks; and of the heads' sums of contacts."""
    sums = [
        (dtype, *sides)
        for dtype, name in NAMES.items()
        for sides in (("fp32", name, 1280, False), ("fp32", name, 1280, True), (name, "fp32", 1280, False))
    ]
    return [
        spec(
            sum_rows,
            f"*{given} *i64 *{given} *i64 *{out}",
            dict(WIDTH=width, COLUMNS=_columns(width), SCALED=scaled),
            _CONFIG,
            direction="bwd",
            dtype=dtype,
        )
        for dtype, given, out, width, scaled in [*sums, (torch.float32, "fp32", "fp32", 20, False)]
    ]
