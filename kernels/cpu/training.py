"""What training runs: `attention_varlen` with its own backward, and around it torch's operations."""

import torch

from esm_fast import _C
from esm_fast.ops.registry import implements
from esm_fast.packed import NAMES

from .common import BACKEND, follow_torch, unproven, why_not


def _run(kernel, q, k, v, cu_seqlens, scale, log_sums, *tensors):
    follow_torch()
    q, k, v, ends = (tensor.detach().contiguous() for tensor in (q, k, v, cu_seqlens))
    rows, heads, head_dim = q.shape
    kernel(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        NAMES[q.dtype],
        rows,
        ends.data_ptr(),
        len(ends) - 1,
        heads,
        head_dim,
        scale,
        0 if log_sums is None else log_sums.data_ptr(),
        *(tensor.data_ptr() for tensor in tensors),
    )


def _train(q, k, v, cu_seqlens, max_seqlen, scale):
    out, log_sums = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[1], len(q))
    _run(_C.attention_varlen, q, k, v, cu_seqlens, scale, log_sums, out)
    return out, (out, log_sums)


def _backward(arguments, kept, grad_outputs):
    q, k, v, cu_seqlens, _, scale = arguments
    out, log_sums = kept
    grads = [torch.empty(q.shape, dtype=q.dtype) for _ in range(3)]
    _run(_C.attention_backward, q, k, v, cu_seqlens, scale, log_sums, out, grad_outputs[0].contiguous(), *grads)
    return *grads, None, None, None


@implements("attention_varlen", backend=BACKEND, why_not=why_not, yields=unproven, train=_train, backward=_backward)
def attention_varlen(q, k, v, cu_seqlens, max_seqlen, scale):
    """See `esm_fast.ops.attention_varlen`."""
    out = torch.empty(q.shape, dtype=q.dtype)
    _run(_C.attention_varlen, q, k, v, cu_seqlens, scale, None, out)
    return out
