"""What the CPU kernels share: when they run, and their arguments."""

import os

import torch

from esm_fast import _C
from esm_fast.formats.weight import DTYPES
from esm_fast.ops.registry import Request

BACKEND = "cpu"
_MAX_HEAD_DIM = 1024
_UNPROVEN = ("base",)


def why_not(request: Request) -> list[str]:
    """What keeps the CPU kernels from running a request; see `registry.Request`."""
    if request.device != "cpu":
        return [f"needs tensors on the CPU, these are on {request.device}"]
    reasons = []
    if request.dtype not in DTYPES.values():
        reasons.append(f"has float32 and bfloat16, not {str(request.dtype).removeprefix('torch.')}")
    if request.head_dim is not None and (request.head_dim % 2 or request.head_dim > _MAX_HEAD_DIM):
        reasons.append(f"needs an even head_dim up to {_MAX_HEAD_DIM}, this is {request.head_dim}")
    return reasons


def unproven(request: Request) -> list[str]:
    """Where torch alone is faster, or was not measured to be slower."""
    if request.level in _UNPROVEN:
        return [f"only by name on {request.level}: not measured faster than torch there"]
    return []


def yields(request: Request) -> list[str]:
    """The same for kernels without a backward of their own."""
    twice = "only by name with gradients: the forward pass would run twice, the second time in torch"
    return [twice] * request.grad + unproven(request)


def follow_torch() -> None:
    """As many threads as torch uses, unless ESM_FAST_THREADS says otherwise."""
    if _C.threads() != torch.get_num_threads() and "ESM_FAST_THREADS" not in os.environ:
        _C.set_threads(torch.get_num_threads())


def require_one_dtype(*tensors: torch.Tensor) -> None:
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"the CPU kernels take weights of one dtype, got {[str(t.dtype) for t in tensors]}")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory for a kernel to write to, whatever default dtype or device torch was told."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def vectors_of(weight: torch.Tensor, *vectors: torch.Tensor) -> list[torch.Tensor]:
    """Gains and biases as the kernels read them beside these weights."""
    dtype = getattr(weight, "beside", weight.dtype)
    return [_as(vector, dtype) for vector in vectors]


def stream_of(x: torch.Tensor) -> torch.Tensor:
    return _as(x, torch.float32)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Itself where nothing is to be done, which is worth asking first: a stack has hundreds of vectors."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return tensor.detach().to(dtype).contiguous()
