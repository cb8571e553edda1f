"""Layer norm into the dtype of the GEMM that follows, of the fp32 residual stream or of a matrix of that dtype."""

import torch

from .common import ceil_div, launch, round_up, row_grid, vector_width
from .sums import column_sums

_THREADS, _WARP = 512, 32  # layer_norm.cu
_SLOTS = {8: 2, 4: 4, 1: 4}  # packs a thread may have in the backward pass, by their elements
_ROWS_EACH = 2  # of a warp, forward: a block reads gain and bias once
_BLOCK_ROWS = 8  # at least, backward: a block writes its shares of the sums, 8 bytes a column
_BLOCKS = 256  # at most: enough for any GPU, and the same on all, so that the bits are


def layer_norm(x, gain, bias, eps: float, keep_statistics: bool = False):
    """(y in gain's dtype, statistics (rows, 2): means and inverse deviations for the backward pass, or None)."""
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=gain.dtype, device=x.device)
    statistics = torch.empty(rows, 2, dtype=torch.float32, device=x.device) if keep_statistics else None
    name = "forward" if x.dtype == torch.float32 else "forward_narrow"
    launch("layer_norm", name, gain.dtype, *row_grid(rows, _ROWS_EACH), x, gain, bias, y, statistics, rows, width, eps)
    return y, statistics


def layer_norm_grads(x, gain, dy, statistics, along=None):
    """(dx in x's dtype, dgain, dbias); `along`: an fp32 gradient of x that passes beside the norm."""
    rows, width = x.shape
    vector = vector_width(width, gain.dtype)
    packs = width // vector
    most = _THREADS * _SLOTS[vector]
    if packs > most:
        raise ValueError(f"the CUDA layer norm's gradient takes widths up to {vector * most} here, this is {width}")
    threads = min(_THREADS, round_up(packs, _WARP))
    blocks = min(ceil_div(rows, _BLOCK_ROWS), _BLOCKS)
    dx = torch.empty_like(x)
    shares = torch.empty(blocks, 2 * width, dtype=torch.float32, device=x.device)
    name = "backward" if dy.dtype == gain.dtype else "backward_wide"
    name = name if x.dtype == torch.float32 else "backward_narrow"
    launch(
        "layer_norm", name, gain.dtype, blocks, threads,
        x, gain, dy, statistics, along, dx, shares, rows, width,
    )  # fmt: skip
    dgain, dbias = column_sums(shares, gain.dtype).split(width)
    return dx, dgain, dbias
