"""What the CUDA kernels share: when they run, and how they are launched."""

import contextlib
import functools

import torch

from esm_fast.ops import registry
from esm_fast.ops.common import aligned
from esm_fast.ops.registry import Request

from .driver import Driver
from .launch import SCALARS, Executor, Launch

BACKEND = "cuda"
_BF16_ARCH = (8, 0)
_WARP, _ROWS_PER_BLOCK = 32, 4  # rows.cuh
_executor: Executor = Driver()


@registry.runs_on
def executor() -> Executor:
    """What runs the kernels: the CUDA driver, unless a test put the emulator in its place."""
    return _executor


@contextlib.contextmanager
def executed_by(other: Executor):
    """Has every launch executed by another one meanwhile."""
    global _executor
    before, _executor = _executor, other
    try:
        yield other
    finally:
        _executor = before


def why_not(request: Request) -> list[str]:
    """What keeps the CUDA kernels from running a request; see `registry.Request`."""
    reasons = []
    if request.device != _executor.device:
        reasons.append(f"needs tensors on {_executor.device}, these are on {request.device}")
    reasons += _executor.why_not()
    if request.dtype not in SCALARS:
        reasons.append(f"has float32, float16 and bfloat16, not {str(request.dtype).removeprefix('torch.')}")
    if request.dtype == torch.bfloat16 and request.arch is not None and request.arch < _BF16_ARCH:
        reasons.append(
            "has bfloat16 from compute capability {}.{} on, this GPU has {}.{}".format(*_BF16_ARCH, *request.arch)
        )
    return reasons


def yields(request: Request) -> list[str]:
    """Nobody gets unasked what has never run on a GPU."""
    return ["only by name on a GPU, where it has never run"]


def implements(op_name: str, *, backward=None, train=None, why_not=why_not):
    """`registry.implements` for this backend, on the device of the tensors, which in a backward autograd sees to; they
    begin where a lane may load 16 bytes."""

    def on_its_device(function):
        @functools.wraps(function)
        def run(*arguments):
            lead = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
            with torch.cuda.device_of(lead):
                return function(*aligned(arguments))

        return run

    def backward_of(arguments, kept, grad_outputs):
        return backward(aligned(arguments), kept, aligned(grad_outputs))

    return lambda forward: registry.implements(
        op_name,
        backend=BACKEND,
        why_not=why_not,
        yields=yields,
        backward=backward and backward_of,
        train=train and on_its_device(train),
    )(on_its_device(forward))


def launch(source: str, name: str, dtype: torch.dtype, grid, block: int, *arguments, shared: int = 0) -> None:
    """Launches kernel <source>_<name> of csrc/cuda/<source>.cu. An empty grid is nothing to do."""
    grid = (grid,) if isinstance(grid, int) else tuple(grid)
    if all(grid):
        _executor.launch(Launch(source, f"{source}_{name}", dtype, grid, block, arguments, shared))


def row_grid(rows: int, each: int = 1) -> tuple[int, int]:
    """(blocks, threads a block) of a kernel that gives a warp to each row, or to so many rows each."""
    return ceil_div(rows, each * _ROWS_PER_BLOCK), _ROWS_PER_BLOCK * _WARP


def ceil_div(n: int, step: int) -> int:
    return -(-n // step)


def round_up(n: int, step: int) -> int:
    return ceil_div(n, step) * step


def vector_width(width: int, dtype: torch.dtype = torch.float32) -> int:
    """Elements that a lane moves at once of rows whose narrower side has this dtype: `elements_of` of packs.cuh."""
    if dtype.itemsize == 2 and width % 16 == 0:
        return 8
    return 1 if width % 4 else 4


def require_one_dtype(*weights: torch.Tensor) -> None:
    if len({weight.dtype for weight in weights}) > 1:
        raise ValueError(f"the CUDA kernels take matrices of one dtype, got {[str(w.dtype) for w in weights]}")


def of_dtype(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors as the kernels read them: of one dtype, contiguous, detached."""
    return [None if tensor is None else tensor.detach().to(dtype).contiguous() for tensor in tensors]
