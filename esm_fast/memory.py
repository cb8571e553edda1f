"""Memory: models without values, pages handed back, and what is refused because it would not fit."""

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


def address(tensor: torch.Tensor) -> int:
    """Of its first element; torch gives that of its storage. Unlike `data_ptr()` no sign of a write, see `edits`."""
    return torch._C._data_address(tensor) + tensor.storage_offset() * tensor.element_size()


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
        start = address(tensor)
        return any(low <= start and start + tensor.nbytes <= high for low, high in self._ranges)

    def forget(self, tensor: torch.Tensor) -> None:
        """Drops a tensor's pages from memory if a file is behind them; they are read again when needed.

        Only for tensors as they were read: what was written into one since is lost. For tensors in ordinary memory
        nothing happens.
        """
        self.forget_bytes(address(tensor), tensor.nbytes)

    def forget_bytes(self, start: int, size: int) -> None:
        """The same by address."""
        end = start + size
        if not any(low <= start and end <= high for low, high in self._ranges):
            return
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, end // page * page  # only pages that hold nothing else
        if first < last:
            # The result does not matter: this is advice, and without it the pages only stay a little longer.
            _MADVISE(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def hand_back() -> None:
    """Gives the pages of freed tensors back that the C library keeps for later ones, where it is glibc."""
    if _TRIM is not None:
        _TRIM(0)


_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class NotEnoughMemory(MemoryError):
    """What was asked for would not fit; the message says what it takes and what there is."""


_WORTH_ASKING = 1 << 30  # bytes; asking takes longer than small things do


def require_room(size: int, what: str, device: torch.device) -> None:
    """Raises NotEnoughMemory where so many bytes more would not fit into the memory of the CPU.

    Linux promises memory that it does not have, and kills who uses it. A GPU's allocator refuses by itself. A compiled
    graph does not ask: it is one for every size.
    """
    if torch.compiler.is_compiling() or size < _WORTH_ASKING or device.type != "cpu":
        return
    room = available()
    if room is not None and size > room:
        raise NotEnoughMemory(
            f"{what} takes {size / 2**30:.1f} GiB of memory, of which {room / 2**30:.1f} GiB are free"
        )


def available() -> int | None:
    """Bytes that this process could still use, its control group's limit counted; None where nobody tells."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        room = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        group = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        used = int((folder / "memory.current").read_text())
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
        return min(room, int((folder / "memory.max").read_text()) - used + int(cached))
    except (OSError, StopIteration, KeyError, ValueError):  # no group, or one without a limit
        return room


_MADVISE = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
