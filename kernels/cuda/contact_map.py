"""contact_map: a layer's contact logits, streamed over its heads; no attention map is ever stored.

The gradient is the reference's, a head at a time.
"""

import torch

from . import attention_varlen
from .attention_varlen import launch_tiles
from .common import implements
from .sums import scatter_sum

_OWN_TILES = 2  # of most of the kernels: q's and k's rows


def why_not(request) -> list[str]:
    return attention_varlen.why_not(request, _OWN_TILES)


def _wholes(sums, cu_seqlens):
    """(heads, sequences): the sum of a whole map; infinite, to divide by, for a map without residues."""
    rows = torch.arange(sums.shape[1], device=sums.device)
    owner = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    wholes = scatter_sum(sums.T.contiguous(), owner, len(cu_seqlens) - 1, sums.dtype)
    return wholes.masked_fill(wholes == 0, torch.inf).T.contiguous()


@implements("contact_map", why_not=why_not)
def contact_map(q, k, cu_seqlens, max_seqlen, size, keep, weight, scale):
    """See `esm_fast.ops.contact_map`."""
    q, k, cu_seqlens, keep = (tensor.detach().contiguous() for tensor in (q, k, cu_seqlens, keep))
    keep, weight = keep.view(torch.uint8), weight.detach().float().contiguous()
    squares = cu_seqlens.diff().long().square()
    lse, sums = torch.empty(2, q.shape[1], len(q), dtype=torch.float32, device=q.device)
    out = lse.new_empty(size)
    ends = cu_seqlens, max_seqlen, scale
    launch_tiles("contact_map", "lse", 1, q, (q, k, lse), *ends)
    launch_tiles("contact_map", "sums", _OWN_TILES, q, (q, k, lse, keep, sums), *ends)
    tensors = q, k, lse, sums, _wholes(sums, cu_seqlens), weight, keep, out, squares.cumsum(0) - squares
    launch_tiles("contact_map", "tiles", _OWN_TILES, q, tensors, *ends, columns=max_seqlen)
    return out
