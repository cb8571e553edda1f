"""Sums in one order, whatever the GPU: down columns, and of the rows that share an index."""

import torch

from .common import ceil_div, launch, vector_width

_WARP, _COLUMN_WARPS, _GATHER_WARPS = 32, 8, 4  # column_sums.cu, gather_sum.cu


def column_sums(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(columns,) of an fp32 matrix."""
    rows, columns = x.shape
    out = torch.empty(columns, dtype=dtype, device=x.device)
    grid = ceil_div(columns // vector_width(columns), _WARP)
    launch("column_sums", "forward", dtype, grid, _COLUMN_WARPS * _WARP, x, out, rows, columns)
    return out


def scatter_sum(x, index, size: int, dtype: torch.dtype, factors=None) -> torch.Tensor:
    """(size, width): row i is the sum of the fp32 rows x[r] whose index[r] is i, each times factors[r]."""
    width = x.shape[1]
    ordered, order = torch.sort(index.long(), stable=True)
    begins = torch.searchsorted(ordered, torch.arange(size + 1, dtype=torch.int64, device=x.device)).int()
    out = torch.empty(size, width, dtype=dtype, device=x.device)
    grid = size, ceil_div(width // vector_width(width), _WARP)
    launch("gather_sum", "forward", dtype, grid, _GATHER_WARPS * _WARP, x, factors, order, begins, out, width)
    return out
