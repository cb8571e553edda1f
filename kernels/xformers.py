"""xformers' memory-efficient attention (Lefaudeux et al. 2022) inside our ops, for NVIDIA GPUs. Optional.

Fused: the attention of all packed sequences in one launch, by a block-diagonal mask, forward and backward; the
projections around it are torch's. xformers chooses among FlashAttention 2 and 3 and CUTLASS by itself; softmax and sums
are fp32 in all of them. Its mask is made of the sequences' lengths on the host, so every call waits for the GPU.
Unproven: no GPU was at hand, so it was run on a stand-in for torch's operators, and not timed.
"""

from functools import partial
from importlib.util import find_spec

import torch

from esm_fast.ops.attention_varlen import attention_varlen as attention_op
from esm_fast.ops.common import ready
from esm_fast.ops.pre_ln_attention import compose
from esm_fast.ops.registry import Request, implements

BACKEND = "xformers"
_OLDEST_ARCH = (8, 0)  # xformers 0.0.31 and newer dropped older GPUs
_NEWEST_FP32_ARCH = (9, 0)  # fp32 has CUTLASS alone, which xformers keeps from newer ones
_MAX_HEAD_DIM = 256


def why_not(request: Request) -> list[str]:
    """What keeps xformers from running a request; see `registry.Request`."""
    reasons = []
    if find_spec("xformers") is None:
        reasons.append("xformers is not installed (pip install 'esm_fast[xformers]')")
    if request.device != "cuda":
        reasons.append(f"needs a CUDA device, the tensors are on {request.device}")
    elif request.arch < _OLDEST_ARCH:
        reasons.append("needs compute capability {}.{}, this GPU has {}.{}".format(*_OLDEST_ARCH, *request.arch))
    elif request.dtype == torch.float32 and request.arch > _NEWEST_FP32_ARCH:
        limits = (*_NEWEST_FP32_ARCH, *request.arch)
        reasons.append("has float32 up to compute capability {}.{}, this GPU has {}.{}".format(*limits))
    if request.dtype == torch.float64:
        reasons.append("has no float64")
    if request.head_dim is not None and (request.head_dim % 8 or request.head_dim > _MAX_HEAD_DIM):
        reasons.append(f"needs a head_dim that is a multiple of 8 up to {_MAX_HEAD_DIM}, this is {request.head_dim}")
    return reasons


def yields(request: Request) -> list[str]:
    return ["only by name: it waits for the sequences' lengths in every layer, and was not measured to be faster"]


def _with_mask(q, k, v, cu_seqlens):
    """(query, key, value, mask), as xformers takes them."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    q, k, v = (tensor[None] for tensor in ready(q, k, v))
    return q, k, v, BlockDiagonalMask.from_seqlens(lengths, device=q.device)


def _train(q, k, v, cu_seqlens, max_seqlen, scale):
    from xformers.ops.fmha import memory_efficient_attention_forward_requires_grad

    if not len(q):
        return torch.empty_like(q), (q, q)
    out, lse = memory_efficient_attention_forward_requires_grad(*_with_mask(q, k, v, cu_seqlens), scale=scale)
    return out[0], (out[0], lse)


def _backward(arguments, kept, grad_outputs):
    from xformers.ops.fmha import memory_efficient_attention_backward

    q, k, v, cu_seqlens, _, scale = arguments
    if not len(q):
        return *(torch.empty_like(tensor) for tensor in (q, k, v)), None, None, None
    (out, lse), (grad,) = kept, ready(*grad_outputs)
    grads = memory_efficient_attention_backward(
        grad[None], out[None], lse, *_with_mask(q, k, v, cu_seqlens), scale=scale
    )
    return *(grad[0] for grad in grads), None, None, None


@implements("attention_varlen", backend=BACKEND, why_not=why_not, yields=yields, train=_train, backward=_backward)
def attention_varlen(q, k, v, cu_seqlens, max_seqlen, scale):
    """See `esm_fast.ops.attention_varlen`."""
    from xformers.ops import memory_efficient_attention_forward

    if not len(q):
        return torch.empty_like(q)
    return memory_efficient_attention_forward(*_with_mask(q, k, v, cu_seqlens), scale=scale)[0]


# By name: inside, too, it runs or says why not.
_composed = partial(compose, attention=partial(attention_op, backend=BACKEND))
implements("pre_ln_attention", backend=BACKEND, why_not=why_not, yields=yields, differentiable=_composed)(_composed)
