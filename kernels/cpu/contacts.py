"""Contacts, streamed over the heads: `contact_map`."""

import torch

from esm_fast import _C
from esm_fast.ops.registry import Request, implements
from esm_fast.packed import NAMES

from .common import BACKEND, follow_torch, require_one_dtype, why_not, yields


def contacts_yield(request: Request) -> list[str]:
    """As `yields`, and in fp32, where most of the time goes into the same exponentials as torch's."""
    even = ["only by name in float32: measured no faster than torch"] if request.dtype == torch.float32 else []
    return yields(request) + even


@implements("contact_map", backend=BACKEND, why_not=why_not, yields=contacts_yield)
def contact_map(q, k, cu_seqlens, max_seqlen, size, keep, weight, scale):
    """See `esm_fast.ops.contact_map`."""
    follow_torch()
    require_one_dtype(q, k)
    q, k, keep, ends = q.detach().contiguous(), k.detach().contiguous(), keep.contiguous(), cu_seqlens.contiguous()
    weight = weight.detach().float().contiguous()
    result = torch.empty(size)
    _C.contact_map(
        q.data_ptr(),
        k.data_ptr(),
        NAMES[q.dtype],
        len(q),
        ends.data_ptr(),
        len(ends) - 1,
        *q.shape[1:],
        keep.data_ptr(),
        weight.data_ptr(),
        scale,
        result.data_ptr(),
    )
    return result
