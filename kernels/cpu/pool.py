"""`pool` on the CPU."""

from esm_fast import _C
from esm_fast.ops.registry import implements

from .common import BACKEND, empty, follow_torch, stream_of, why_not, yields


@implements("pool", backend=BACKEND, why_not=why_not, yields=yields)
def pool(x, cu_seqlens, weight):
    """See `esm_fast.ops.pool`."""
    follow_torch()
    result = empty(len(cu_seqlens) - 1, x.shape[1])
    _C.pool(x=stream_of(x), cu_seqlens=cu_seqlens.contiguous(), weight=stream_of(weight), result=result)
    return result
