"""pool: a weighted sum of each sequence's rows."""

import torch

from .common import ceil_div, implements, launch, row_grid, vector_width

_WARPS, _WARP = 8, 32  # pool.cu


def _backward(arguments, kept, grad_outputs):
    x, cu_seqlens, weight = arguments
    stream, shares = x.float().contiguous(), weight.float().contiguous()
    rows, width = x.shape
    dx, dweight = torch.empty_like(stream), torch.empty_like(shares)
    launch(
        "pool", "backward", torch.float32, *row_grid(rows),
        stream, cu_seqlens.contiguous(), shares, grad_outputs[0].contiguous(), dx, dweight,
        rows, len(cu_seqlens) - 1, width,
    )  # fmt: skip
    return dx.to(x.dtype), None, dweight.to(weight.dtype)


@implements("pool", backward=_backward)
def pool(x, cu_seqlens, weight):
    """See `esm_fast.ops.pool`."""
    width, sequences = x.shape[1], len(cu_seqlens) - 1
    out = torch.empty(sequences, width, dtype=torch.float32, device=x.device)
    grid = sequences, ceil_div(width // vector_width(width), _WARP)
    tensors = x.float().contiguous(), cu_seqlens.contiguous(), weight.float().contiguous(), out
    launch("pool", "forward", torch.float32, grid, _WARPS * _WARP, *tensors, width)
    return out
