"""`pool_max` on the CPU."""

from esm_fast import _C
from esm_fast.ops.registry import implements

from .common import BACKEND, empty, follow_torch, stream_of, why_not, yields


@implements("pool_max", backend=BACKEND, why_not=why_not, yields=yields)
def pool_max(x, cu_seqlens, counted):
    """See `esm_fast.ops.pool_max`."""
    follow_torch()
    result = empty(len(cu_seqlens) - 1, x.shape[1])
    _C.pool_max(x=stream_of(x), cu_seqlens=cu_seqlens.contiguous(), counted=counted.contiguous(), result=result)
    return result
