"""Compiling for a GPU that is elsewhere: launches on CPU tensors that fill Triton's cache and run nothing.

The kernels are launched by the same code as on the GPU, so that the cache holds exactly what will be looked for there;
only Triton's driver is replaced, by one that names the architecture. What the launches would have computed stays
uninitialised.
"""

from contextlib import contextmanager

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import common


class _Elsewhere:
    """In place of Triton's driver. JITFunction keeps compiled kernels by device: no real one has such a name."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> str:
        return f"sm_{self.capability}"

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiling_for(capability: int):
    """Within, the Triton kernels take CPU tensors and are compiled for an architecture, such as 80, but not run."""
    if common.interpreted():
        raise ValueError("TRITON_INTERPRET is set, and Triton's interpreter compiles nothing; unset it")
    run, active = JITFunction.run, driver._active

    def compile_only(self, *arguments, grid, warmup, **options):
        return run(self, *arguments, grid=grid, warmup=True, **options)

    JITFunction.run, driver._active, common.elsewhere = compile_only, _Elsewhere(capability), capability
    try:
        yield
    finally:
        JITFunction.run, driver._active, common.elsewhere = run, active, None
