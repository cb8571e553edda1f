"""`pool_moments` on the CPU."""

from esm_fast import _C
from esm_fast.ops.registry import implements

from .common import BACKEND, empty, follow_torch, stream_of, why_not, yields


@implements("pool_moments", backend=BACKEND, why_not=why_not, yields=yields)
def pool_moments(x, cu_seqlens, weight):
    """See `esm_fast.ops.pool_moments`."""
    follow_torch()
    result = empty(len(cu_seqlens) - 1, 2, x.shape[1])
    _C.pool_moments(x=stream_of(x), cu_seqlens=cu_seqlens.contiguous(), weight=stream_of(weight), result=result)
    return result
