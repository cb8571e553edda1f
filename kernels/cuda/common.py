"""What the CUDA kernels share: when they run, and how they are launched."""

import contextlib

import torch

from esm_fast.ops.registry import Request, select

from .launch import SCALARS, Executor, Launch

BACKEND = "cuda"
_executor: Executor | None = None


def executor() -> Executor:
    """What runs the kernels: the CUDA driver, unless a test put the emulator in its place."""
    global _executor
    if _executor is None:
        from .driver import Driver

        _executor = Driver()
    return _executor


@contextlib.contextmanager
def executed_by(other: Executor):
    """Runs every launch by another executor meanwhile."""
    global _executor
    before, _executor = _executor, other
    select.cache_clear()
    try:
        yield other
    finally:
        _executor = before
        select.cache_clear()


def why_not(request: Request) -> list[str]:
    """What keeps the CUDA kernels from running a request; see `registry.Request`."""
    reasons = []
    if request.device != executor().device:
        reasons.append(f"needs tensors on {executor().device}, these are on {request.device}")
    else:
        reasons += executor().why_not()
    if request.dtype not in SCALARS:
        reasons.append(f"has float32, float16 and bfloat16, not {str(request.dtype).removeprefix('torch.')}")
    if request.dtype == torch.bfloat16 and request.arch is not None and request.arch < (8, 0):
        reasons.append("has bfloat16 from compute capability 8.0 on, this GPU has {}.{}".format(*request.arch))
    return reasons


def launch(source: str, name: str, dtype: torch.dtype, grid, block: int, *arguments, shared: int = 0) -> None:
    """Launches kernel <source>_<name> of csrc/cuda/<source>.cu. An empty grid is nothing to do."""
    grid = (grid,) if isinstance(grid, int) else tuple(grid)
    if all(grid):
        executor().launch(Launch(source, f"{source}_{name}", dtype, grid, block, arguments, shared))
