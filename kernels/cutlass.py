"""torch's own memory-efficient attention (Rabe & Staats 2021), in CUTLASS kernels that came from xformers; NVIDIA GPUs.

Fused: the attention of all packed sequences, forward and backward, in one launch each, by cu_seqlens; the projections
around it are torch's. Softmax and sums are fp32. It comes with torch and runs on every GPU from the V100 to the H100.
The backward is told not to split the keys: their parts would be added in no fixed order, and how many there are
depends on the batch, so a sequence's gradients would depend on its neighbours.
Unproven: no GPU was at hand, so this was held to torch's schema and run on a stand-in for torch's operators.
"""

from functools import partial

import torch

from esm_fast.ops.attention_varlen import attention_varlen as attention_op
from esm_fast.ops.common import joined, parts_of, ready
from esm_fast.ops.pre_ln_attention import compose
from esm_fast.ops.registry import Request, implements

BACKEND = "cutlass"
_OLDEST_ARCH, _OLDEST_BF16 = (5, 0), (8, 0)
_NEWEST_MAJOR = 9  # whether there are kernels beyond depends on the release of torch
_ALIGNED = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 4}  # elements in 16 bytes
_NO_MASK = 0
_MOST_SEQUENCES = 65_535  # of a launch: they are its grid's third axis


def why_not(request: Request) -> list[str]:
    """What keeps torch's kernels from running a request; see `registry.Request`."""
    if request.device != "cuda":
        return [f"needs a CUDA device, the tensors are on {request.device}"]
    if torch.version.hip is not None:
        return ["needs an NVIDIA GPU, this torch is built for ROCm"]
    name = str(request.dtype).removeprefix("torch.")
    reasons = []
    if request.arch < _OLDEST_ARCH or request.arch[0] > _NEWEST_MAJOR:
        oldest, arch = (".".join(map(str, pair)) for pair in (_OLDEST_ARCH, request.arch))
        reasons.append(f"needs compute capability {oldest} to {_NEWEST_MAJOR}.x, this GPU has {arch}")
    elif request.dtype == torch.bfloat16 and request.arch < _OLDEST_BF16:
        oldest, arch = (".".join(map(str, pair)) for pair in (_OLDEST_BF16, request.arch))
        reasons.append(f"has bfloat16 from compute capability {oldest} on, this GPU has {arch}")
    if request.dtype not in _ALIGNED:
        reasons.append(f"has float32, float16 and bfloat16, not {name}")
    elif request.head_dim is not None and request.head_dim % _ALIGNED[request.dtype]:
        multiple = _ALIGNED[request.dtype]
        reasons.append(f"needs a head_dim that is a multiple of {multiple} in {name}, this is {request.head_dim}")
    return reasons


def _attend(q, k, v, cu_seqlens, max_seqlen, scale, keep_lse):
    """(out, [log-sum-exp of every row: (sequences, heads, max_seqlen up to a multiple of 32), empty unless kept])."""
    if not len(q):
        return torch.empty_like(q), [q.new_empty(0, dtype=torch.float32)]
    found, (q, k, v) = [], ready(q, k, v)
    for rows, ends in parts_of(cu_seqlens, len(q), _MOST_SEQUENCES):
        longest = min(max_seqlen, rows.stop - rows.start)
        out, lse, *_ = torch.ops.aten._efficient_attention_forward(
            *(tensor[None, rows] for tensor in (q, k, v)), None, ends, ends, longest, longest, 0.0, _NO_MASK, keep_lse,
            scale=scale,
        )  # fmt: skip
        found.append((out[0], lse))
    outs, lses = zip(*found, strict=True)
    return joined(outs), list(lses)


def _train(q, k, v, cu_seqlens, max_seqlen, scale):
    out, lses = _attend(q, k, v, cu_seqlens, max_seqlen, scale, True)
    return out, (out, *lses)


def _backward(arguments, kept, grad_outputs):
    q, k, v, cu_seqlens, max_seqlen, scale = arguments
    out, *lses = kept
    if not len(q):
        return *(torch.empty_like(tensor) for tensor in (q, k, v)), None, None, None
    grads, (grad, q, k, v, out) = [], ready(*grad_outputs, q, k, v, out)
    for (rows, ends), lse in zip(parts_of(cu_seqlens, len(q), _MOST_SEQUENCES), lses, strict=True):
        longest = min(max_seqlen, rows.stop - rows.start)
        no_seed = lse.new_empty((), dtype=torch.int64)  # of the dropout, of which there is none
        grads.append(torch.ops.aten._efficient_attention_backward(
            *(tensor[None, rows] for tensor in (grad, q, k, v)), None, out[None, rows], ends, ends, longest, longest,
            lse, 0.0, no_seed, no_seed, _NO_MASK, False, scale=scale, num_splits_key=1,
        )[:3])  # fmt: skip
    return *(joined([part[0] for part in parts]) for parts in zip(*grads, strict=True)), None, None, None


@implements("attention_varlen", backend=BACKEND, why_not=why_not, train=_train, backward=_backward)
def attention_varlen(q, k, v, cu_seqlens, max_seqlen, scale):
    """See `esm_fast.ops.attention_varlen`."""
    return _attend(q, k, v, cu_seqlens, max_seqlen, scale, False)[0]


# Where gradients are due, by name: inside, too, it runs or says why not. Else the kernel itself, whose reasons are the
# same, and whose arguments are made here.
_composed = partial(compose, attention=partial(attention_op, backend=BACKEND))
_direct = partial(compose, attention=attention_varlen)
implements("pre_ln_attention", backend=BACKEND, why_not=why_not, differentiable=_composed)(_direct)
