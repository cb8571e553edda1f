"""The CPU backend: fused C++ kernels in csrc/cpu, one set per instruction-set level, chosen at run time.

Fused: LN, GEMM, bias, GELU and residual of `gelu_ffn`; LN, projections, attention over the packed sequences and
residual of `pre_ln_attention`; all heads of `contact_map`, without ever storing a map. Statistics, softmax, sums and
the residual stream are fp32. A row's result has the same bits whatever the batch around it and the number of threads.
What surrounds the layers is in `edges`. What won, what lost and by how much: docs/cpu.md.

Plain weights are packed once per tensor, beside the original: as much memory again (bf16 ESM-1b: 1.3 GB). With
`esm_fast.load(packed=True)` or a file of `esm-fast convert --pack` there is the packed copy only (esm_fast/packed.py).
"""

import os
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from esm_fast import _C
from esm_fast.ops.registry import Request, implements
from esm_fast.packed import NAMES, PackedWeight

BACKEND = "cpu"
_MAX_HEAD_DIM = 1024
_UNPROVEN = ("base",)


def why_not(request: Request) -> list[str]:
    """What keeps the CPU kernels from running a request; see `registry.Request`."""
    reasons = []
    if request.device != "cpu":
        reasons.append(f"needs tensors on the CPU, these are on {request.device}")
    if request.dtype not in NAMES:
        reasons.append(f"has float32 and bfloat16, not {str(request.dtype).removeprefix('torch.')}")
    if request.head_dim is not None and (request.head_dim % 2 or request.head_dim > _MAX_HEAD_DIM):
        reasons.append(f"needs an even head_dim up to {_MAX_HEAD_DIM}, this is {request.head_dim}")
    return reasons


def yields(request: Request) -> list[str]:
    """Where torch alone is faster, or was not measured to be slower."""
    reasons = []
    if request.grad:
        reasons.append("only by name with gradients: the forward pass would run twice, the second time in torch")
    if _C.isa() in _UNPROVEN:
        reasons.append(f"only by name on {_C.isa()}: not measured faster than torch there")
    return reasons


def contacts_yield(request: Request) -> list[str]:
    """As `yields`, and in fp32, where most of the time goes into the same exponentials as torch's."""
    even = ["only by name in float32: measured no faster than torch"] if request.dtype == torch.float32 else []
    return yields(request) + even


class _State(NamedTuple):
    """What tells whether a tensor still holds the values that were packed."""

    version: int | None
    address: int
    shape: torch.Size
    dtype: torch.dtype
    sample: int


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def packed(weight: torch.Tensor) -> _C.Weights:
    """The packed copy of a weight matrix: of a plain tensor, made when first asked for and again when it has changed.

    In-place operations and a new `.data` are noticed. Writes that bypass autograd's version counter (through `.data` or
    a NumPy view) are noticed by a sample of 32 words: an update of the whole matrix is, that of one element may not be.
    """
    if isinstance(weight, PackedWeight):
        return weight.weights
    size = weight.numel() * weight.element_size()
    version = None if weight.is_inference() else weight._version
    sample = _C.fingerprint(weight.data_ptr(), size) if weight.is_contiguous() else None
    state = _State(version, weight.data_ptr(), weight.shape, weight.dtype, sample)
    known = _packed.get(weight)
    if known is None or known[0] != state or sample is None:
        known = _packed[weight] = (state, PackedWeight.pack(weight).weights)
    return known[1]


def _follow_torch() -> None:
    """As many threads as torch uses, unless ESM_FAST_THREADS says otherwise."""
    if "ESM_FAST_THREADS" not in os.environ and _C.threads() != torch.get_num_threads():
        _C.set_threads(torch.get_num_threads())


def _require_one_dtype(*tensors: torch.Tensor) -> None:
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"the CPU kernels take weights of one dtype, got {[str(t.dtype) for t in tensors]}")


def _vectors(weight: torch.Tensor, *vectors: torch.Tensor) -> list[torch.Tensor]:
    """Gains and biases as the kernels read them: of the weights' dtype, contiguous."""
    return [vector.detach().to(weight.dtype).contiguous() for vector in vectors]


def _stream(x: torch.Tensor) -> torch.Tensor:
    return x.detach().float().contiguous()


@implements("gelu_ffn", backend=BACKEND, priority=10, why_not=why_not, yields=yields)
def gelu_ffn(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
    """See `esm_fast.ops.gelu_ffn`."""
    _follow_torch()
    _require_one_dtype(fc1_weight, fc2_weight)
    stream = _stream(x)
    result = torch.empty_like(stream)
    gain, bias, bias1, bias2 = _vectors(fc1_weight, ln_weight, ln_bias, fc1_bias, fc2_bias)
    _C.gelu_ffn(
        stream.data_ptr(),
        result.data_ptr(),
        len(stream),
        eps,
        gain.data_ptr(),
        bias.data_ptr(),
        packed(fc1_weight),
        bias1.data_ptr(),
        packed(fc2_weight),
        bias2.data_ptr(),
    )
    return result.to(x.dtype)


@implements("pre_ln_attention", backend=BACKEND, priority=10, why_not=why_not, yields=yields)
def pre_ln_attention(
    x,
    cu_seqlens,
    max_seqlen,
    ln_weight,
    ln_bias,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    v_weight,
    v_bias,
    out_weight,
    out_bias,
    heads,
    eps,
    rotary,
    return_qk,
):
    """See `esm_fast.ops.pre_ln_attention`."""
    _follow_torch()
    _require_one_dtype(q_weight, k_weight, v_weight, out_weight)
    stream, ends = _stream(x), cu_seqlens.contiguous()
    result = torch.empty_like(stream)
    vectors = _vectors(q_weight, ln_weight, ln_bias, q_bias, k_bias, v_bias, out_bias)
    gain, bias, q_bias, k_bias, v_bias, out_bias = (vector.data_ptr() for vector in vectors)
    tables = None if rotary is None else rotary.detach().float().contiguous()
    shape = len(x), heads, x.shape[1] // heads
    q, k = (torch.empty(shape, dtype=q_weight.dtype) for _ in range(2)) if return_qk else (None, None)
    _C.pre_ln_attention(
        stream.data_ptr(),
        result.data_ptr(),
        len(stream),
        ends.data_ptr(),
        len(ends) - 1,
        heads,
        eps,
        gain,
        bias,
        packed(q_weight),
        q_bias,
        packed(k_weight),
        k_bias,
        packed(v_weight),
        v_bias,
        packed(out_weight),
        out_bias,
        0 if tables is None else tables.data_ptr(),
        0 if q is None else q.data_ptr(),
        0 if k is None else k.data_ptr(),
    )
    result = result.to(x.dtype)
    return (result, q, k) if return_qk else result


@implements("contact_map", backend=BACKEND, priority=10, why_not=why_not, yields=contacts_yield)
def contact_map(q, k, cu_seqlens, keep, weight, scale):
    """See `esm_fast.ops.contact_map`."""
    _follow_torch()
    _require_one_dtype(q, k)
    q, k, keep, ends = q.detach().contiguous(), k.detach().contiguous(), keep.contiguous(), cu_seqlens.contiguous()
    weight = weight.detach().float().contiguous()
    result = torch.empty(int(ends.diff().long().square().sum()))
    _C.contact_map(
        q.data_ptr(),
        k.data_ptr(),
        NAMES[q.dtype],
        len(q),
        ends.data_ptr(),
        len(ends) - 1,
        *q.shape[1:],
        keep.data_ptr(),
        weight.data_ptr(),
        scale,
        result.data_ptr(),
    )
    return result


from . import edges  # noqa: E402, F401 -- the rest of the backend, built on the names above
