"""contact_map: a layer's contact logits and their gradient, streamed over its heads; no attention map is stored."""

import torch

from . import attention_varlen
from .attention_varlen import launch_tiles
from .common import ceil_div, implements, launch
from .sums import scatter_sum

_OWN_TILES = 2  # of two of the kernels: q's and k's rows
_ROWS, _HEADS, _THREADS = 32, 32, 128  # mirror.cu


def why_not(request) -> list[str]:
    return attention_varlen.why_not(request, _OWN_TILES)


def _prepared(q, k, cu_seqlens, keep, weight):
    """The tensors as the kernels read them."""
    q, k, cu_seqlens, keep = (tensor.detach().contiguous() for tensor in (q, k, cu_seqlens, keep))
    return q, k, cu_seqlens, keep.view(torch.uint8), weight.detach().float().contiguous()


def _starts(cu_seqlens):
    """Where each sequence's map begins."""
    squares = cu_seqlens.diff().long().square()
    return squares.cumsum(0) - squares


def _owners(cu_seqlens, n: int):
    return torch.searchsorted(cu_seqlens, torch.arange(n, dtype=torch.int64, device=cu_seqlens.device), right=True) - 1


def _by_sequence(numbers, cu_seqlens):
    """(heads, sequences): sums of (heads, n)."""
    owner = _owners(cu_seqlens, numbers.shape[1])
    return scatter_sum(numbers.T.contiguous(), owner, len(cu_seqlens) - 1, numbers.dtype).T.contiguous()


def _wholes(sums, cu_seqlens):
    """(heads, sequences): the sum of a whole map; infinite, to divide by, for a map without residues."""
    wholes = _by_sequence(sums, cu_seqlens)
    return wholes.masked_fill(wholes == 0, torch.inf)


def _train(q, k, cu_seqlens, max_seqlen, size, keep, weight, scale):
    q, k, cu_seqlens, keep, weight = _prepared(q, k, cu_seqlens, keep, weight)
    lse, sums = torch.empty(2, q.shape[1], len(q), dtype=torch.float32, device=q.device)
    out = lse.new_empty(size)
    ends = cu_seqlens, max_seqlen, scale
    launch_tiles("contact_map", "lse", 1, q, (q, k, lse), *ends)
    launch_tiles("contact_map", "sums", _OWN_TILES, q, (q, k, lse, keep, sums), *ends)
    tensors = q, k, lse, sums, _wholes(sums, cu_seqlens), weight, keep, out, _starts(cu_seqlens)
    launch_tiles("contact_map", "tiles", _OWN_TILES, q, tensors, *ends, columns=max_seqlen)
    return out, (lse, sums)


def _mirrored(grad, sums, keep, starts, cu_seqlens, max_seqlen: int):
    """(the gradient of the maps plus its mirror image, its products with every head's row sums)."""
    heads, n = sums.shape
    mirrored, products = torch.empty_like(grad), torch.empty_like(sums)
    tiles = ceil_div(max_seqlen, _ROWS)
    grid = tiles * (len(cu_seqlens) - 1), ceil_div(heads, _HEADS)
    tensors = grad, sums, keep, mirrored, products, starts, cu_seqlens
    launch("mirror", "sums", torch.float32, grid, _THREADS, *tensors, n, tiles, heads)
    return mirrored, products


def _backward(arguments, kept, grad_outputs):
    q, k, cu_seqlens, max_seqlen, _, keep, regression, scale = arguments
    q, k, cu_seqlens, keep, weight = _prepared(q, k, cu_seqlens, keep, regression)
    lse, sums = kept
    starts = _starts(cu_seqlens)
    g, products = _mirrored(grad_outputs[0].contiguous(), sums, keep, starts, cu_seqlens, max_seqlen)
    wholes, owner = _wholes(sums, cu_seqlens), _owners(cu_seqlens, len(q))
    along_products = _by_sequence(sums * products, cu_seqlens) / (2 * wholes)
    e = weight[:, None] * (along_products[:, owner] - products) / wholes[:, owner]
    dq, dk, delta, along = (torch.empty_like(tensor) for tensor in (q, k, lse, lse))
    common = q, k, lse, e, weight, g, keep
    for name, outputs in (("rows", (delta, along)), ("q", (delta, dq)), ("k", (delta, dk))):
        tensors = *common, *outputs, starts
        launch_tiles("contact_map_backward", name, 1, q, tensors, cu_seqlens, max_seqlen, scale)
    dweight = along.sum(1) - along_products.sum(1)
    return dq, dk, None, None, None, None, dweight.to(regression.dtype), None


@implements("contact_map", backward=_backward, train=_train, why_not=why_not)
def contact_map(*arguments):
    """See `esm_fast.ops.contact_map`."""
    return _train(*arguments)[0]
