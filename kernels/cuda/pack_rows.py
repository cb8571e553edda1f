"""pack_rows and unpack_rows: a warp a row of the result; see csrc/cuda/pack.cu."""

from .common import implements, launch, row_grid


def _backward_of_pack(arguments, kept, grad_outputs):
    padded, rows = arguments
    return unpack_rows(*grad_outputs, rows, len(padded)), None


def _backward_of_unpack(arguments, kept, grad_outputs):
    return pack_rows(*grad_outputs, arguments[1]), None, None


@implements("pack_rows", backward=_backward_of_pack)
def pack_rows(padded, rows):
    """See `esm_fast.ops.pack_rows`."""
    n, width = len(rows), padded.shape[1]
    out = padded.new_empty(n, width)
    tensors = padded.contiguous(), rows.contiguous(), out
    launch("pack", "take_rows", padded.dtype, *row_grid(n), *tensors, n, width)
    return out


@implements("unpack_rows", backward=_backward_of_unpack)
def unpack_rows(packed, rows, size):
    """See `esm_fast.ops.pack_rows.unpack_rows`."""
    n, width = packed.shape
    out = packed.new_empty(size, width)
    tensors = packed.contiguous(), rows.contiguous(), out
    launch("pack", "spread_rows", packed.dtype, *row_grid(size), *tensors, n, size, width)
    return out
