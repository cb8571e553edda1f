"""xformers' memory-efficient attention (Lefaudeux et al. 2022) inside our ops, for NVIDIA GPUs. Optional.

Fused: the attention of all packed sequences in one launch, by a block-diagonal mask; the projections around it are
torch's. Statistics and accumulation are fp32 in xformers' kernels.
Unproven: no GPU was at hand when this was written, so it has been neither run nor timed on one.
"""

from functools import partial
from importlib.util import find_spec

import torch

from esm_fast.ops.pre_ln_attention import compose
from esm_fast.ops.registry import Request, implements

BACKEND = "xformers"
_OLDEST_ARCH = (8, 0)  # xformers 0.0.31 and newer dropped older GPUs
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
    if request.dtype == torch.float64:
        reasons.append("has no float64")
    if request.head_dim is not None and (request.head_dim % 8 or request.head_dim > _MAX_HEAD_DIM):
        reasons.append(f"needs a head_dim that is a multiple of 8 up to {_MAX_HEAD_DIM}, this is {request.head_dim}")
    return reasons


@implements("attention_varlen", backend=BACKEND, priority=10, why_not=why_not)
def attention_varlen(q, k, v, cu_seqlens, max_seqlen, scale):
    """See `esm_fast.ops.attention_varlen`."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    mask = BlockDiagonalMask.from_seqlens(lengths)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]


# Not `attention_varlen` through the registry: a named backend must not pick another one inside.
implements("pre_ln_attention", backend=BACKEND, priority=10, why_not=why_not)(
    partial(compose, attention=attention_varlen)
)
