"""Whether the tensors of a call are memory that a kernel may read by address. Where they are not, torch's own
operations compute the op: they know what stands behind a tensor, a kernel would compute something else, silently.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.autograd import forward_ad

from .contract import PLAIN

_TRACED = (
    "torch.jit.trace records one batch's lengths as constants, and its graph would be wrong for every other batch: use "
    "torch.compile, or trace the original package's model"
)


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which torch's fused operations do not all know."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def why(tensors: Sequence[torch.Tensor]) -> str | None:
    """What keeps kernels from a call's tensors; None if nothing does.

    Raises RuntimeError under torch.jit.trace, ValueError for a tensor whose memory was freed.
    """
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(_TRACED)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func (grad, vmap, jvp, ...) transforms the call, and can transform only torch's own operations"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation follows torch's own operations only"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active, which sees torch's own operations only"
    kinds = set(map(type, tensors))
    if not kinds <= PLAIN:
        names = ", ".join(sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds - PLAIN))
        return f"there are tensors of another class, {names}, whose memory may not be their values"
    if any(map(torch.Tensor.is_neg, tensors)):
        return "a tensor is the negative of what its memory holds; call resolve_neg()"
    if not all(map(torch._C._data_address, tensors)):  # which unlike data_ptr() is no sign of a write: edits.py
        _require_memory(tensors)
    return None


def _require_memory(tensors: Sequence[torch.Tensor]) -> None:
    """Raises ValueError for a tensor that reading would end the process."""
    for tensor in tensors:
        owns = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type != "meta"
        if owns and tensor.numel() and not torch._C._data_address(tensor):
            raise ValueError(
                f"the memory of a tensor {tuple(tensor.shape)} was freed, as sharding and offloading do between uses: "
                "gather the weights before the call"
            )
