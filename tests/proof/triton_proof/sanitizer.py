"""Watches every launch in Triton's interpreter: bounds, races, undefined lanes, and the bytes that are moved.

What it raises on: an access outside the tensors handed to the launch (a view's gaps are outside too), a misaligned one,
an address that one program writes and another reads or writes, two lanes of one store at one address, an atomic
update (its order is not fixed), a grid that CUDA refuses. A masked-off lane of a load without `other` is
undefined on a GPU: it reads NaN or the largest integer here.
What it cannot see: a read from another sequence of the same tensor. Poisoned neighbours show that.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, _interpreter

from . import speed
from .numerics import BFLOAT16, numpy_dtype

NOBODY, MANY = -1, -2
MAX_GRID = (2**31 - 1, 65535, 65535)
TRITON = str(Path(triton.__file__).parent)


class Fault(AssertionError):
    """A kernel did what no kernel may."""


class OutOfBounds(Fault):
    pass


class Race(Fault):
    pass


class Traffic(NamedTuple):
    """Bytes of one launch: as requested by the programs (what L2 serves), and each address once (what DRAM must)."""

    kernel: str
    requested: int
    distinct: int


class _Memory:
    """One storage: which of its elements belong to a tensor argument, and which programs read and wrote them."""

    def __init__(self, storage: torch.UntypedStorage, dtype: torch.dtype):
        self.base, self.width, self.dtype = storage.data_ptr(), dtype.itemsize, dtype
        size = storage.nbytes() // self.width
        self.inside = np.zeros(size, bool)
        self.reader, self.writer = (np.full(size, NOBODY, np.int32) for _ in range(2))
        self.written = False  # by anyone

    def admit(self, tensor: torch.Tensor) -> None:
        if tensor.dtype != self.dtype:
            raise Fault(f"one storage is handed over both as {self.dtype} and as {tensor.dtype}")
        shape = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        if tensor.numel():
            inside = torch.from_numpy(self.inside).as_strided(shape, tensor.stride(), tensor.storage_offset())
            inside.numpy()[...] = True

    def has(self, offsets) -> bool:
        """Whether all are elements of an argument."""
        return offsets.max() < len(self.inside) and bool(self.inside[offsets].all())


class _Launch:
    """The state of one launch."""

    def __init__(self, kernel: str, tensors: list[torch.Tensor]):
        self.kernel, self.requested = kernel, 0
        self.prepared: set[int] = set()  # the modules, by their globals, that see the interpreter's triton.language
        memories: dict[int, _Memory] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                memories.setdefault(storage.data_ptr(), _Memory(storage, tensor.dtype)).admit(tensor)
        self.memories = [memories[base] for base in sorted(memories)]
        self.bases = np.array(sorted(memories), np.uint64)

    def touch(self, pointers: TensorHandle, mask: TensorHandle, grid_index, *, store: bool) -> None:
        """Checks and records one load or store of one program."""
        asked = mask.data if mask.data.shape == pointers.data.shape else np.broadcast_to(mask.data, pointers.data.shape)
        addresses = pointers.data[asked.astype(bool, copy=False)]
        for owner, own in self._by_owner(addresses) if addresses.size else ():
            if owner < 0:
                self._fail(OutOfBounds, "an address below every tensor argument", grid_index, store)
            memory = self.memories[owner]
            offsets = (own - self.bases[owner]).astype(np.int64)
            astray = offsets & (memory.width - 1)
            offsets >>= memory.width.bit_length() - 1
            if memory.width != pointers.get_element_ty().primitive_bitwidth // 8 and memory.dtype != torch.bool:
                self._fail(Fault, "an element width that is not the tensor's", grid_index, store)
            if astray.any():
                self._fail(Fault, "a misaligned address", grid_index, store)
            if not memory.has(offsets):
                self._fail(OutOfBounds, "an address outside every tensor argument", grid_index, store)
            self._order(memory, offsets, grid_index, store)
            self.requested += offsets.size * memory.width

    def _by_owner(self, addresses) -> list[tuple]:
        """(storage, the addresses in it), nearly always one."""
        first, last = np.searchsorted(self.bases, [addresses.min(), addresses.max()], "right") - 1
        if first == last:
            return [(first, addresses)]
        owners = np.searchsorted(self.bases, addresses, "right") - 1
        return [(owner, addresses[owners == owner]) for owner in np.unique(owners)]

    def _order(self, memory: _Memory, offsets, grid_index, store: bool) -> None:
        """No address may be written by one program and touched by another: their order is not defined."""
        program = np.ravel_multi_index(grid_index, self.grid)
        readers = memory.reader[offsets]
        if memory.written:
            writers = memory.writer[offsets]
            if ((writers != NOBODY) & (writers != program)).any():
                self._fail(Race, "what another program writes", grid_index, store)
        if not store:
            memory.reader[offsets] = np.where((readers == NOBODY) | (readers == program), program, MANY)
            return
        if ((readers != NOBODY) & (readers != program)).any():
            self._fail(Race, "what another program reads", grid_index, store)
        if np.unique(offsets).size != offsets.size:
            self._fail(Race, "one address from two lanes", grid_index, store)
        memory.writer[offsets], memory.written = program, True

    def traffic(self) -> Traffic:
        touched = sum(
            (np.count_nonzero(m.reader != NOBODY) + np.count_nonzero(m.writer != NOBODY)) * m.width
            for m in self.memories
        )
        return Traffic(self.kernel, self.requested, touched)

    def _fail(self, kind: type[Fault], what: str, grid_index, store: bool):
        verb = "stores to" if store else "loads"
        raise kind(f"{self.kernel} {verb} {what}: program {grid_index} of grid {self.grid}, {_line_in_kernel()}")


def _line_in_kernel() -> str:
    """Where in the kernel's source the interpreter is."""
    frame = sys._getframe()
    while frame.f_code.co_filename.startswith((TRITON, __file__, speed.__file__)):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


_current: _Launch | None = None
_recorded: list[Traffic] | None = None
_execute, _patch = GridExecutor.__call__, interpreter._patch_lang
_place, _write = InterpreterBuilder.set_grid_dim, InterpreterBuilder.create_masked_store


def install() -> None:
    """Replaces the interpreter's methods for this process."""
    GridExecutor.__call__ = _watched
    InterpreterBuilder.set_grid_dim = _set_grid_dim
    InterpreterBuilder.create_masked_load = _load
    InterpreterBuilder.create_masked_store = _store
    interpreter._patch_lang = _patch_once_a_launch
    InterpreterBuilder.create_atomic_rmw = InterpreterBuilder.create_atomic_cas = _no_atomics


@contextmanager
def recording():
    """Yields a list that grows by the Traffic of every launch."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launching() -> bool:
    return _current is not None


def _watched(self, *arguments, **options):
    global _current
    _current = _Launch(self.fn.__name__, list(_tensors([*arguments, *options.values()])))
    try:
        _execute(self, *arguments, **options)
        if _recorded is not None:
            _recorded.append(_current.traffic())
    except InterpreterError as error:
        raise _cause(error) from None
    finally:
        _current = None


def _patch_once_a_launch(function):
    """The interpreter would prepare triton.language again for every call of a device function, which takes longer than
    the call."""
    module = id(function.__globals__)
    if module in _current.prepared:
        return interpreter._LangPatchScope()
    _current.prepared.add(module)
    return _patch(function)


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _cause(error: BaseException) -> BaseException:
    """The fault itself, out of the interpreter's wrappers."""
    inner = error
    while inner is not None and not isinstance(inner, Fault):
        inner = inner.__cause__
    return inner or error


def _set_grid_dim(self, *grid):
    if any(size > limit for size, limit in zip(grid, MAX_GRID, strict=True)):
        raise Fault(f"{_current.kernel}: CUDA refuses the grid {grid}, the limits are {MAX_GRID}")
    _current.grid = grid
    _place(self, *grid)


def _load(self, pointers, mask, other, *_how, **_hints):  # descriptors give hints by name
    _current.touch(pointers, mask, self.grid_idx, store=False)
    return undefined_where_masked(self, pointers, mask, other)


def undefined_where_masked(self, pointers, mask, other, *_):
    """The interpreter's load; lanes that are masked off without `other` are undefined, as on a GPU."""
    triton_dtype = pointers.get_element_ty()
    dtype = numpy_dtype(triton_dtype)
    if other is None:
        filling = np.full(pointers.data.shape, undefined(dtype), dtype)
    else:
        filling = np.ascontiguousarray(np.broadcast_to(other.data, pointers.data.shape)).astype(dtype, copy=False)
    raw = np.dtype(np.uint16) if dtype == BFLOAT16 else dtype  # the C++ side knows NumPy's own types only
    loaded = _interpreter.load(pointers.data, mask.data, filling.view(raw), raw)
    return TensorHandle(loaded.view(dtype), triton_dtype)


def undefined(dtype: np.dtype):
    """What a masked-off lane reads when nothing was said: something no right result can come from."""
    if dtype == np.bool_:
        return dtype.type(True)
    return np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else dtype.type(float("nan"))


def _store(self, pointers, value, mask, *how):  # Triton before 3.9 gives two hints of the cache
    _current.touch(pointers, mask, self.grid_idx, store=True)
    if value.data.dtype == BFLOAT16:
        value = TensorHandle(np.ascontiguousarray(value.data).view(np.uint16), tl.uint16)
    return _write(self, pointers, value, mask, *how)


def _no_atomics(self, *_):
    raise Race(f"{_current.kernel} updates memory atomically, in no fixed order: {_line_in_kernel()}")
