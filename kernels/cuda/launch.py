"""How a CUDA kernel is launched: a description that does not depend on what executes it.

The driver executes it on a GPU (driver.py), the tests' emulator on the CPU (tests/proof/cuda_emulator): both are an
Executor, and both are handed the same kernel names, grids, blocks and arguments.
"""

import ctypes
from typing import NamedTuple, Protocol

import torch

# The dtypes a kernel is compiled for, by the names that csrc/cuda/common.cuh has for them.
SCALARS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_LETTERS = {
    torch.float32: "f",
    torch.float16: "h",
    torch.bfloat16: "b",
    torch.uint8: "c",
    torch.int32: "i",
    torch.int64: "l",
}
_WIDEST = 2**31


class Launch(NamedTuple):
    """One launch of `kernel` in csrc/cuda/<source>.cu, as compiled for `dtype`.

    arguments: tensors and None are passed as addresses, ints as 32 bits, floats as fp32, ctypes as they are.
    """

    source: str
    kernel: str
    dtype: torch.dtype
    grid: tuple[int, ...]
    block: int
    arguments: tuple
    shared: int = 0  # bytes of dynamic shared memory


class Executor(Protocol):
    """Runs launches in order, on tensors of one device type."""

    device: str

    def why_not(self) -> list[str]:
        """What keeps it from running anything here."""
        ...

    def launch(self, launch: Launch) -> None: ...


def parameters(launch: Launch) -> tuple[str, list]:
    """(a letter a parameter, the parameters in ctypes); a kernel is handed the addresses of the latter.

    Letters: of a tensor its dtype's (_LETTERS) as a capital, P for None; i for 32 bits, u for 64, f for fp32, d for
    fp64.
    """
    pairs = [_parameter(launch, argument) for argument in launch.arguments]
    return "".join(letter for letter, _ in pairs), [value for _, value in pairs]


def _parameter(launch: Launch, argument) -> tuple[str, object]:
    if argument is None:
        return "P", ctypes.c_void_p(None)
    if isinstance(argument, torch.Tensor):
        if not argument.is_contiguous():
            raise ValueError(f"{launch.kernel}: a kernel takes contiguous tensors, not strides {argument.stride()}")
        return _LETTERS[argument.dtype].upper(), ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return "f", ctypes.c_float(argument)
    if isinstance(argument, int):
        if not -_WIDEST <= argument < _WIDEST:
            raise ValueError(f"{launch.kernel}: {argument} does not fit the kernel's 32 bits")
        return "i", ctypes.c_int32(argument)
    if isinstance(argument, ctypes.c_uint64 | ctypes.c_double):
        return "u" if isinstance(argument, ctypes.c_uint64) else "d", argument
    raise TypeError(f"{launch.kernel}: a kernel takes no {type(argument).__name__}")
