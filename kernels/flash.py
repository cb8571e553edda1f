"""torch's own FlashAttention-2 (Dao 2023) over packed sequences; NVIDIA GPUs from sm_80 to sm_90, half precision.

Fused: the attention of all packed sequences, forward and backward, in one launch each, by cu_seqlens; the projections
around it are torch's. Softmax and sums are fp32. It comes with torch; faster than its CUTLASS kernels by estimate. The
backward is told to be deterministic: it adds the shares of dq in a fixed order, and not as blocks happen to finish.
Unproven: no GPU was at hand, so this was held to torch's schema and run on a stand-in for torch's operators. So it
runs by name, or where `esm-fast qualify` found it right and faster on the GPU at hand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from esm_fast.ops.attention_varlen import attention_varlen as attention_op
from esm_fast.ops.common import joined, parts_of, ready
from esm_fast.ops.pre_ln_attention import compose
from esm_fast.ops.registry import Request, implements

BACKEND = "flash"
_OLDEST_ARCH, _NEWEST_MAJOR = (8, 0), 9
_MAX_HEAD_DIM = 256
_MOST_SEQUENCES = 65_535  # of a launch: they are its grid's second axis
_WHOLE = (0.0, False)  # no dropout, not causal


def why_not(request: Request) -> list[str]:
    """What keeps torch's kernels from running a request; see `registry.Request`."""
    if request.device != "cuda":
        return [f"needs a CUDA device, the tensors are on {request.device}"]
    reasons = []
    if torch.version.hip is not None:
        reasons.append("needs an NVIDIA GPU, this torch is built for ROCm")
    if request.arch < _OLDEST_ARCH or request.arch[0] > _NEWEST_MAJOR:
        oldest, arch = (".".join(map(str, pair)) for pair in (_OLDEST_ARCH, request.arch))
        reasons.append(f"needs compute capability {oldest} to {_NEWEST_MAJOR}.x, this GPU has {arch}")
    if request.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"has float16 and bfloat16, not {str(request.dtype).removeprefix('torch.')}")
    if request.head_dim is not None and (request.head_dim % 8 or request.head_dim > _MAX_HEAD_DIM):
        reasons.append(f"needs a head_dim that is a multiple of 8 up to {_MAX_HEAD_DIM}, this is {request.head_dim}")
    return reasons


def yields(request: Request) -> list[str]:
    return ["only by name on a GPU, where it has never run here: esm-fast qualify tries it"]


def _train(q, k, v, cu_seqlens, max_seqlen, scale):
    """(out, what the backward needs: the output and, of each launch, its log-sum-exp and two states of no dropout)."""
    if not len(q):
        return torch.empty_like(q), (q,)
    outs, kept, (q, k, v) = [], [], ready(q, k, v)
    for rows, ends in parts_of(cu_seqlens, len(q), _MOST_SEQUENCES):
        longest = min(max_seqlen, rows.stop - rows.start)
        out, *states = torch.ops.aten._flash_attention_forward(
            q[rows], k[rows], v[rows], ends, ends, longest, longest, *_WHOLE, False, scale=scale
        )
        outs.append(out)
        kept += states[:3]
    out = joined(outs)
    return out, (out, *kept)


def _backward(arguments, kept, grad_outputs):
    q, k, v, cu_seqlens, max_seqlen, scale = arguments
    if not len(q):
        return *(torch.empty_like(tensor) for tensor in (q, k, v)), None, None, None
    out, *states = kept
    grads, (grad, q, k, v, out) = [], ready(*grad_outputs, q, k, v, out)
    parts = parts_of(cu_seqlens, len(q), _MOST_SEQUENCES)
    for number, (rows, ends) in enumerate(parts):
        longest = min(max_seqlen, rows.stop - rows.start)
        lse, seed, unused = states[3 * number : 3 * number + 3]
        with _deterministic():
            grads.append(torch.ops.aten._flash_attention_backward(
                grad[rows], q[rows], k[rows], v[rows], out[rows], lse, ends, ends, longest, longest, *_WHOLE, seed,
                unused, scale=scale,
            ))  # fmt: skip
    return *map(joined, zip(*grads, strict=True)), None, None, None


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch's switch for all ops is the only one that its backward reads."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches = torch.utils.deterministic
    fill, switches.fill_uninitialized_memory = switches.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = fill


@implements("attention_varlen", backend=BACKEND, why_not=why_not, yields=yields, train=_train, backward=_backward)
def attention_varlen(q, k, v, cu_seqlens, max_seqlen, scale):
    """See `esm_fast.ops.attention_varlen`."""
    return _train(q, k, v, cu_seqlens, max_seqlen, scale)[0]


# Where gradients are due, by name: inside, too, it runs or says why not. Else the kernel itself, whose reasons are the
# same, and whose arguments are made here.
_composed = partial(compose, attention=partial(attention_op, backend=BACKEND))
_direct = partial(compose, attention=attention_varlen)
implements("pre_ln_attention", backend=BACKEND, why_not=why_not, yields=yields, differentiable=_composed)(_direct)
