"""attention_varlen: flash attention over packed sequences, by tensor cores for half types."""

import torch

from . import common
from .common import ceil_div, implements, launch

_TILE, _OTHER, _LARGEST = 16, 32, 128  # attention.cuh
_TURING, _TURINGS_SHARED = (7, 5), 64 << 10  # the only one that gives a block less than fp32 may need


def _warps(dtype) -> int:
    return 2 if dtype == torch.float32 else 4


def _padded(head_dim: int) -> int:
    return 64 if head_dim <= 64 else _LARGEST


def shared_bytes(dtype: torch.dtype, head_dim: int, own_tiles: int) -> int:
    """Of a block that holds so many tiles of its own rows: see Shared in attention.cuh."""
    size, own = dtype.itemsize, _warps(dtype) * _TILE
    stride = _padded(head_dim) + 16 // size
    scratch = max(_OTHER * size // 4 + _TILE, _OTHER) + 8
    return (own_tiles * own + 2 * _OTHER) * stride * size + own * scratch * 4 + 2 * _OTHER * 4


def fits(arch, dtype: torch.dtype, head_dim: int, own_tiles: int) -> bool:
    """Whether a GPU's blocks have the shared memory for it."""
    return arch != _TURING or shared_bytes(dtype, head_dim, own_tiles) <= _TURINGS_SHARED


def why_not(request, own_tiles: int | None = None) -> list[str]:
    """What keeps kernels from running a request, whose blocks hold so many tiles of their own rows."""
    reasons = common.why_not(request)
    head_dim, own_tiles = request.head_dim, own_tiles or 1 + request.grad
    if head_dim is not None and head_dim > _LARGEST:
        reasons.append(f"takes heads of up to {_LARGEST} columns, these have {head_dim}")
    elif not fits(request.arch, request.dtype, head_dim, own_tiles):
        what = "float32 gradients" if request.grad else "float32"
        reasons.append(f"needs more shared memory than this GPU has for {what} of heads of {head_dim}")
    return reasons


def launch_tiles(source, name, own_tiles, q, tensors, cu_seqlens, max_seqlen, scale, columns=None):
    """A kernel over tiles of q's rows: a block each in every head, or in every 32 `columns`, where they are given."""
    n, heads, head_dim = q.shape
    tiles = ceil_div(max_seqlen, _warps(q.dtype) * _TILE)
    grid = tiles * (len(cu_seqlens) - 1), heads if columns is None else ceil_div(columns, _OTHER)
    launch(
        source, f"{name}_{_padded(head_dim)}", q.dtype, grid, _warps(q.dtype) * 32,
        *tensors, cu_seqlens, n, tiles, heads, head_dim, float(scale),
        shared=shared_bytes(q.dtype, head_dim, own_tiles),
    )  # fmt: skip


def _launch(name, own_tiles, tensors, cu_seqlens, max_seqlen, scale):
    launch_tiles("attention", name, own_tiles, tensors[0], tensors, cu_seqlens, max_seqlen, scale)


def attend(q, k, v, cu_seqlens, max_seqlen, scale):
    """(out, log-sum-exp in base 2, (heads, n)) of contiguous q, k and v."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    _launch("forward", 1, (q, k, v, out, lse), cu_seqlens, max_seqlen, scale)
    return out, lse


def attend_backward(q, k, v, out, lse, grad, cu_seqlens, max_seqlen, scale):
    """(dq, dk, dv), all arguments contiguous."""
    dq, dk, dv, delta = (torch.empty_like(tensor) for tensor in (q, k, v, lse))
    _launch("backward_q", 2, (q, k, v, out, lse, grad, delta, dq), cu_seqlens, max_seqlen, scale)
    _launch("backward_kv", 2, (q, k, v, lse, grad, delta, dk, dv), cu_seqlens, max_seqlen, scale)
    return dq, dk, dv


def _train(q, k, v, cu_seqlens, max_seqlen, scale):
    out, lse = attend(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens.contiguous(), max_seqlen, scale)
    return out, (out, lse)


def _backward(arguments, kept, grad_outputs):
    q, k, v, cu_seqlens, max_seqlen, scale = arguments
    tensors = (tensor.contiguous() for tensor in (q, k, v, *kept, *grad_outputs, cu_seqlens))
    return *attend_backward(*tensors, max_seqlen, scale), None, None, None


@implements("attention_varlen", backward=_backward, train=_train, why_not=why_not)
def attention_varlen(q, k, v, cu_seqlens, max_seqlen, scale):
    """See `esm_fast.ops.attention_varlen`."""
    return _train(q, k, v, cu_seqlens, max_seqlen, scale)[0]
