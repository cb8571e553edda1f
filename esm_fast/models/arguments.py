"""What callers give to a model, looked at once, where it enters: the same for every API.

An op's contract checks what kernels read. This is about what torch's own operations would do with it before that: a
list has no `ndim`, a tensor on the meta device no values, and to read freed memory ends the process.
"""

from typing import Any

import torch
from torch.fx import _symbolic_trace
from torch.nn.parameter import UninitializedTensorMixin

from ..ops.contract import PLAIN
from ..ops.opaque import transformed

_KEYS = torch._C._TorchDispatchModeKey
_EXPORT = (
    "torch.export, torch.fx, torch.jit.script, make_fx and FakeTensorMode record a call without the values of its "
    "tokens, which decide here how many rows there are to compute with: use torch.compile, or export "
    "the original package's model"
)


def refuse_recording() -> None:
    """Raises RuntimeError where a call is recorded with tensors that have no values. torch.compile is none of these."""
    if torch.compiler.is_exporting() or _symbolic_trace._is_fx_tracing_flag:
        raise RuntimeError(_EXPORT)
    if not torch.compiler.is_compiling() and any(map(torch._C._get_dispatch_mode, (_KEYS.FAKE, _KEYS.PROXY))):
        raise RuntimeError(_EXPORT)


class Unscriptable:
    """What torch.jit.script asks first: it would read the source, and end in what it does not know there."""

    def __prepare_scriptable__(self):
        raise RuntimeError(_EXPORT)


def require_tensor(name: str, value: Any, *, integers: bool = False, optional: bool = False) -> None:
    """Raises TypeError for what is no tensor, ValueError for one that has no numbers to read; both name it.

    integers: whether it must hold whole numbers. optional: whether it may be None.
    """
    if value is None and optional:
        return
    if not isinstance(value, torch.Tensor):
        kind = "None" if value is None else type(value).__name__
        raise TypeError(f"{name} must be a tensor, not {kind}: torch.as_tensor makes one of a list or an array")
    if torch.compiler.is_compiling():
        return
    if problem := _problem(value):
        raise ValueError(f"{name} {problem}")
    if integers and (value.is_floating_point() or value.is_complex()):
        raise ValueError(f"{name} must hold integers, got {tuple(value.shape)} {value.dtype}")


def _problem(value: torch.Tensor) -> str | None:
    if isinstance(value, UninitializedTensorMixin):
        return "is a parameter without a shape: its module has to be called first"
    if value.layout is not torch.strided or value.is_quantized:
        kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        return f"is {kind}: give a dense tensor of plain numbers"
    if value.is_complex():
        return "is complex: give real numbers"
    if value.is_meta:
        return "is on the meta device, where tensors have no values"
    if type(value) in PLAIN and value.numel() and not transformed() and not torch._C._data_address(value):
        return "has no memory: it was freed, as sharding and offloading do between uses"
    return None
