"""What the CPU kernels share: when they run, their packed weights, their arguments."""

import os
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from esm_fast import _C
from esm_fast.ops.registry import Request
from esm_fast.packed import NAMES, PackedWeight

BACKEND = "cpu"
_MAX_HEAD_DIM = 1024
_UNPROVEN = ("base",)


def why_not(request: Request) -> list[str]:
    """What keeps the CPU kernels from running a request; see `registry.Request`."""
    if request.device != "cpu":
        return [f"needs tensors on the CPU, these are on {request.device}"]
    reasons = []
    if request.dtype not in NAMES:
        reasons.append(f"has float32 and bfloat16, not {str(request.dtype).removeprefix('torch.')}")
    if request.head_dim is not None and (request.head_dim % 2 or request.head_dim > _MAX_HEAD_DIM):
        reasons.append(f"needs an even head_dim up to {_MAX_HEAD_DIM}, this is {request.head_dim}")
    return reasons


def unproven(request: Request) -> list[str]:
    """Where torch alone is faster, or was not measured to be slower."""
    if _C.isa() in _UNPROVEN:
        return [f"only by name on {_C.isa()}: not measured faster than torch there"]
    return []


def yields(request: Request) -> list[str]:
    """The same for kernels without a backward of their own."""
    twice = "only by name with gradients: the forward pass would run twice, the second time in torch"
    return [twice] * request.grad + unproven(request)


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


def follow_torch() -> None:
    """As many threads as torch uses, unless ESM_FAST_THREADS says otherwise."""
    if "ESM_FAST_THREADS" not in os.environ and _C.threads() != torch.get_num_threads():
        _C.set_threads(torch.get_num_threads())


def require_one_dtype(*tensors: torch.Tensor) -> None:
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"the CPU kernels take weights of one dtype, got {[str(t.dtype) for t in tensors]}")


def vectors_of(weight: torch.Tensor, *vectors: torch.Tensor) -> list[torch.Tensor]:
    """Gains and biases as the kernels read them: of the weights' dtype, contiguous."""
    return [_as(vector, weight.dtype) for vector in vectors]


def stream_of(x: torch.Tensor) -> torch.Tensor:
    return _as(x, torch.float32)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Itself where nothing is to be done, which is worth asking first: a stack has hundreds of vectors."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return tensor.detach().to(dtype).contiguous()
