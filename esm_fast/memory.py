"""Loading in little more memory than the weights take: models without values, and pages handed back."""

import ctypes
import mmap
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def without_values():
    """Modules made in this context have their parameters on the meta device.

    They are not initialised either: on that device the initialisers would do nothing, but import all of sympy first.
    """
    with torch.device("meta"), _Uninitialised():
        yield


class _Uninitialised(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) != torch.nn.init.__name__:
            return function(*args, **(kwargs or {}))
        return args[0] if args else kwargs["tensor"]


class MappedFiles:
    """The file-backed mappings of this process as they are now; elsewhere than on Linux, none."""

    def __init__(self):
        self._ranges = []
        if sys.platform != "linux":
            return
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, mode, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0" and mode.endswith("p"):
                self._ranges.append(tuple(int(address, 16) for address in addresses.split("-")))

    def hold(self, tensor: torch.Tensor) -> bool:
        """Whether a file is behind a tensor's memory."""
        start = torch._C._data_address(tensor)
        return any(low <= start and start + tensor.nbytes <= high for low, high in self._ranges)

    def forget(self, tensor: torch.Tensor) -> None:
        """Drops a tensor's pages from memory if a file is behind them; they are read again when needed.

        Only for tensors as they were read: what was written into one since is lost. For tensors in ordinary memory
        nothing happens.
        """
        if not self.hold(tensor):
            return
        start = torch._C._data_address(tensor)
        end = start + tensor.nbytes
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, end // page * page  # only pages that hold nothing else
        if first < last:
            # The result does not matter: this is advice, and without it the pages only stay a little longer.
            _MADVISE(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


_MADVISE = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
