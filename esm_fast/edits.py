"""Whether a tensor may have been written since: what prepacked copies of plain weights need to know in every call.

torch's version counters miss writes through `.data` and NumPy. Its copy-on-write storages miss nothing that goes
through torch: one leaves that state when anybody asks for memory to write to, be it an operation in place, `.data`,
`detach().numpy()`, DLPack, `data_ptr()` or an extension; with one owner, nothing is copied. So a watched tensor is
put into this state, and one look at it tells whether nobody could have written.

What NumPy or DLPack was given can be written later unseen. Such memory is never watched, nor is what torch did not
allocate (mapped files, shared memory): who asks has to read all of it. Beyond this is only a bare address from
`data_ptr()` that was taken before and is kept; `repack` is for that.
"""

from collections import Counter
from itertools import count
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .memory import MappedFiles, address
from .ops.contract import PLAIN

# Storage -> the number of the last watch of the one tensor in it. By storages, not by tensors: where anybody has a weak
# reference to one, torch refuses swap_tensors, and with it `module.to` where it is told to swap.
_watched: WeakIdKeyDictionary = WeakIdKeyDictionary()
_numbers = count()
_OWN_AND_THIS_LOOK = 2  # references to a storage that no other tensor uses, while Python looks at it


class Watch(NamedTuple):
    """Of a tensor as it was: nobody has written since if it `holds`."""

    version: int | None
    address: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    number: int | None

    def holds(self, tensor: torch.Tensor) -> bool:
        return torch._C._is_cow_tensor(tensor) and self == _state(tensor, _watched.get(tensor.untyped_storage()))


def _state(tensor: torch.Tensor, number: int | None) -> Watch:
    version = None if tensor.is_inference() else tensor._version
    return Watch(version, address(tensor), tensor.shape, tensor.stride(), tensor.dtype, number)


def watch(tensor: torch.Tensor) -> Watch | None:
    """From now on; None where a write could go unseen."""
    if not tensor.numel() or tensor.device.type != "cpu":
        return None
    if address(tensor) in _mapped.get(tensor.untyped_storage(), ()):
        _bring_in(tensor)
    storage = tensor.untyped_storage()
    if not storage.resizable() or torch._C._storage_Use_Count(storage._cdata) > _OWN_AND_THIS_LOOK:
        return None
    try:
        torch._lazy_clone(tensor.detach())  # which is dropped: what stays is the storage's state
    except RuntimeError:  # memory that torch did not allocate
        return None
    _watched[storage] = number = next(_numbers)
    return _state(tensor, number)


# Storage -> addresses of the parameters that were loaded as they lie in a file -> calls in which they were read whole.
_mapped: WeakIdKeyDictionary = WeakIdKeyDictionary()
_CALLS = 2  # a copy costs as much as several readings: who calls once or twice does not pay it


def lies_in_a_file(module: nn.Module) -> None:
    """Tells of a new model, whose memory nobody else has: in its third call weights that lie in a mapped file come into
    memory that can be watched, unless somebody holds them by then."""
    mapped = MappedFiles()
    for parameter in module.parameters():
        if type(parameter) is nn.Parameter and parameter.device.type == "cpu" and mapped.hold(parameter):
            _mapped.setdefault(parameter.untyped_storage(), {})[address(parameter)] = 0


def _bring_in(parameter: torch.Tensor) -> None:
    storage, at = parameter.untyped_storage(), address(parameter)
    calls = _mapped[storage]
    calls[at] += 1
    if calls[at] <= _CALLS or not parameter.requires_grad:  # a frozen one may itself be behind an array
        return
    if torch._C._storage_Use_Count(storage._cdata) == len(calls) + 1:
        with torch.inference_mode(False):
            parameter.data = parameter.detach().clone()
        del calls[at]


def repack(module: nn.Module) -> nn.Module:
    """Has a model's weights read in its next call, and what the CPU kernels keep of those that changed made anew.

    Only needed after a write through an address that was taken before the model ran (ctypes, an extension that keeps
    pointers): every other edit is noticed. Weights that still lie in a mapped file, as those of transformers'
    models do, come into memory, so that they need not be read in each call. Returns the model.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.layout == torch.strided and tensor.device.type == "cpu" and type(tensor) in PLAIN:
            _watched.pop(tensor.untyped_storage(), None)
    _into_own_memory(module)
    return module


def _into_own_memory(module: nn.Module) -> None:
    """Those that share their memory stay."""
    mapped = MappedFiles()
    own = [p for p in module.parameters() if type(p) is nn.Parameter and p.device.type == "cpu"]
    found = [p for p in own if mapped.hold(p)]
    addresses = Counter(map(address, found))
    for parameter in found:
        if addresses[address(parameter)] == 1:
            calls = _mapped.get(parameter.untyped_storage(), {})
            calls.pop(address(parameter), None)
            parameter.data = parameter.detach().clone()
