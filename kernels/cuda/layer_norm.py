"""Layer norm of the fp32 residual stream, into the dtype of the GEMM that follows."""

import torch

from .common import launch

_ROWS_PER_BLOCK, _WARP = 4, 32  # rows.cuh


def layer_norm(x, gain, bias, eps: float, keep_statistics: bool = False):
    """(y in gain's dtype, statistics (rows, 2) of means and inverse deviations for the backward, or None)."""
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=gain.dtype, device=x.device)
    statistics = torch.empty(rows, 2, device=x.device) if keep_statistics else None
    grid, block = row_grid(rows)
    launch("layer_norm", "forward", gain.dtype, grid, block, x, gain, bias, y, statistics, rows, width, eps)
    return y, statistics


def row_grid(rows: int) -> tuple[int, int]:
    """(blocks, threads a block) of a kernel that gives a warp to each row."""
    return -(-rows // _ROWS_PER_BLOCK), _ROWS_PER_BLOCK * _WARP
