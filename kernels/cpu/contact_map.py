"""`contact_map` on the CPU: streamed over the heads."""

import torch

from esm_fast import _C
from esm_fast.ops.registry import Request, implements

from .common import BACKEND, empty, follow_torch, require_one_dtype, stream_of, why_not, yields


def contacts_yield(request: Request) -> list[str]:
    """As `yields`, and in fp32, where most of the time goes into the same exponentials as torch's."""
    even = ["only by name in float32: measured no faster than torch"] if request.dtype == torch.float32 else []
    return yields(request) + even


@implements("contact_map", backend=BACKEND, why_not=why_not, yields=contacts_yield)
def contact_map(q, k, cu_seqlens, max_seqlen, size, keep, weight, scale):
    """See `esm_fast.ops.contact_map`."""
    follow_torch()
    require_one_dtype(q, k)
    result = empty(size)
    _C.contact_map(
        q=q.detach().contiguous(),
        k=k.detach().contiguous(),
        cu_seqlens=cu_seqlens.contiguous(),
        keep=keep.contiguous(),
        weight=stream_of(weight),
        scale=scale,
        result=result,
    )
    return result
