"""`masked_softmax` on the CPU."""

from esm_fast import _C
from esm_fast.ops.registry import implements

from .common import BACKEND, empty, follow_torch, why_not, yields


@implements("masked_softmax", backend=BACKEND, why_not=why_not, yields=yields)
def masked_softmax(scores, lengths):
    """See `esm_fast.ops.masked_softmax`."""
    follow_torch()
    result = empty(*scores.shape)
    _C.masked_softmax(scores=scores.detach().contiguous(), lengths=lengths.long().contiguous(), result=result)
    return result
