"""A CUDA driver that launches nothing, for what the host does around it: Triton's own launcher runs, down to libcuda.

Kernels take CPU tensors and are compiled for an architecture; what they would have computed stays uninitialised.
"""

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_C = r"""
#include <stddef.h>
#include <stdint.h>
typedef uint64_t u64;
int esm_launches = 0;
#define SAYS(name) int name() { return 0; }
SAYS(cuCtxSetCurrent) SAYS(cuDeviceGet) SAYS(cuFuncSetAttribute) SAYS(cuFuncSetCacheConfig) SAYS(cuModuleUnload)
SAYS(cuCtxSetLimit) SAYS(cuInit) SAYS(cuOccupancyMaxActiveClusters) SAYS(cuTensorMapEncodeTiled)
SAYS(cuTensorMapEncodeIm2col) SAYS(cuPointerGetAttributes) SAYS(cuStreamIsCapturing) SAYS(cuCtxGetDevice)
int cuDeviceGetAttribute(int *v, int what, int device) { *v = 232448; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int device) { *c = (void *)1; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuFuncGetAttribute(int *v, int what, void *f) { *v = what == 0 ? 1024 : 0; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "no driver"; return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *v) { *v = 1; return 0; }
int cuCtxGetLimit(size_t *v, int what) { *v = 0; return 0; }
int cuPointerGetAttribute(u64 *data, int what, u64 pointer) { *data = pointer; return 0; }
int cuModuleLoadData(void **m, const void *image) { *m = (void *)1; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = (void *)1; return 0; }
int cuLaunchKernelEx(const void *config, void *f, void **arguments, void **extra) { esm_launches++; return 0; }
"""


@functools.cache
def library() -> ctypes.CDLL:
    """libcuda.so.1 of this process; Triton finds it by that name. Needs a C compiler."""
    folder = Path(tempfile.mkdtemp(prefix="stub_driver"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = folder / "libcuda.so.1"
    (folder / "stub.c").write_text(_C)
    compiler = os.environ.get("CC", "gcc")
    flags = ["-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, "-o", str(made), str(folder / "stub.c")], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)


def launches() -> int:
    """How many there were in this process."""
    return ctypes.c_int.in_dll(library(), "esm_launches").value


@contextlib.contextmanager
def stubbed(capability: int = 90, launched: Callable | None = None) -> Iterator[None]:
    """Within, the Triton kernels take CPU tensors, are compiled, and launched down to the driver.

    launched: is called in place of the last step in C, with all that this is handed, kernels by their names.
    """
    library()
    from esm_fast.kernels.triton import common, elsewhere
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime import driver

    real = CudaUtils()

    class Utils:
        def __getattr__(self, name):
            return getattr(real, name)

        def load_binary(self, name, *more):
            loaded = real.load_binary(name, *more)
            return loaded if launched is None else (loaded[0], name, *loaded[2:])

    if launched is not None:
        Utils.launch = staticmethod(launched)

    class Driver(elsewhere._Elsewhere):
        utils, launcher_cls = Utils(), CudaLauncher

        def get_current_device(self) -> int:  # a number, for the driver; no real device has such a one
            return self.capability

    before, stub = (driver._active, common.elsewhere), Driver(capability)
    atexit.register(setattr, driver, "_active", stub)  # kernels that are kept are unloaded in the end
    driver._active, common.elsewhere = stub, capability
    try:
        yield
    finally:
        driver._active, common.elsewhere = before
