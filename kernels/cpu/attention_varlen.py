"""`attention_varlen` on the CPU, with a backward of its own."""

from esm_fast import _C
from esm_fast.ops.registry import implements

from .common import BACKEND, empty, follow_torch, unproven, why_not


def _inputs(q, k, v, cu_seqlens, scale) -> dict:
    follow_torch()
    tensors = dict(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()} | dict(scale=scale)


def train(q, k, v, cu_seqlens, max_seqlen, scale):
    """The result, and for the backward pass the log of every softmax's sum."""
    out, log_sums = empty(*q.shape, dtype=q.dtype), empty(q.shape[1], len(q))
    _C.attention_varlen(**_inputs(q, k, v, cu_seqlens, scale), log_sums=log_sums, out=out)
    return out, (out, log_sums)


def backward(arguments, kept, grad_outputs):
    q, k, v, cu_seqlens, _, scale = arguments
    out, log_sums = kept
    dq, dk, dv = (empty(*q.shape, dtype=q.dtype) for _ in range(3))
    _C.attention_varlen_backward(
        **_inputs(q, k, v, cu_seqlens, scale),
        log_sums=log_sums,
        out=out,
        dout=grad_outputs[0].contiguous(),
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return dq, dk, dv, None, None, None


@implements("attention_varlen", backend=BACKEND, why_not=why_not, yields=unproven, train=train, backward=backward)
def attention_varlen(q, k, v, cu_seqlens, max_seqlen, scale):
    """See `esm_fast.ops.attention_varlen`."""
    out = empty(*q.shape, dtype=q.dtype)
    _C.attention_varlen(**_inputs(q, k, v, cu_seqlens, scale), log_sums=None, out=out)
    return out
