"""gelu(h + bias) after a GEMM, and its backward pass."""

import torch

from .common import ceil_div, launch, vector_width
from .sums import column_sums

_THREADS = 128  # bias_gelu.cu
_CHUNKS = 256  # blocks that share the rows, at most: enough for any GPU, and the same on all, so that the bits are
_ROWS = 8  # of a block, at least, for which it reads the bias once


def bias_gelu(h, bias):
    y = torch.empty_like(h)
    grid = _grid(h)
    launch("bias_gelu", "forward", h.dtype, grid, _THREADS, h, bias, y, *h.shape)
    return y


def bias_gelu_grads(h, bias, dy):
    """(dh, dbias)"""
    dh, grid = torch.empty_like(h), _grid(h)
    shares = torch.empty(grid[1], h.shape[1], dtype=torch.float32, device=h.device)
    launch("bias_gelu", "backward", h.dtype, grid, _THREADS, h, bias, dy, dh, shares, *h.shape)
    return dh, column_sums(shares, bias.dtype)


def _grid(h) -> tuple[int, int]:
    rows, width = h.shape
    packs = width // vector_width(width, h.dtype)
    return ceil_div(packs, _THREADS), min(ceil_div(rows, _ROWS), _CHUNKS)
