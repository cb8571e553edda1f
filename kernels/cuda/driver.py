"""Runs the compiled kernels on a GPU, through the CUDA driver alone: it is looked for when first needed, never linked.

The cubins lie in cubins.zip beside this file, where setup.py built them; see csrc/cuda/build.py.
"""

import ctypes
import functools
import threading
import zipfile
from pathlib import Path

import torch

from .launch import SCALARS, Launch, parameters

CUBINS = Path(__file__).parent / "cubins.zip"
_PTX = "compute_90"  # what a GPU newer than all cubins gets, compiled by its driver
_SHARED_UNASKED = 48 << 10
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class DriverError(RuntimeError):
    """The CUDA driver refused; the message is its own."""


@functools.cache
def _library():
    """libcuda, initialised. Raises DriverError with the reason where there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"0 CUDA devices: no NVIDIA driver ({error})") from None
    _check(cuda, cuda.cuInit(0), "cuInit")
    return cuda


def _check(cuda, code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        raise DriverError(f"{what}: {text.value.decode() if text.value else f'error {code}'}")


@functools.cache
def devices() -> tuple[int, str | None]:
    """(number of CUDA devices, why there are none)."""
    try:
        cuda, count = _library(), ctypes.c_int()
        _check(cuda, cuda.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    except DriverError as error:
        return 0, str(error)
    return count.value, None if count.value else "0 CUDA devices: the driver found none"


@functools.cache
def built() -> frozenset[str]:
    """Names of the cubins that were built with this package."""
    if not CUBINS.exists():
        return frozenset()
    with zipfile.ZipFile(CUBINS) as archive:
        return frozenset(archive.namelist())


def image_name(source: str, scalar: str, arch: tuple[int, int]) -> str:
    """The file to load: the newest cubin of the same generation that is no newer than the GPU, else PTX."""
    stem = f"{source}.{scalar}"
    for minor in range(arch[1], -1, -1):
        if (name := f"{stem}.sm_{arch[0]}{minor}.cubin") in built():
            return name
    if arch > (9, 0) and f"{stem}.{_PTX}.ptx" in built():
        return f"{stem}.{_PTX}.ptx"
    raise DriverError(f"{stem} was not compiled for compute capability {arch[0]}.{arch[1]}")


class Driver:
    """The executor on GPUs: launches on torch's current stream of the tensors' device."""

    device = "cuda"

    def __init__(self):
        self._kernels: dict[tuple[str, str], ctypes.c_void_p] = {}
        self._lock = threading.Lock()

    def why_not(self) -> list[str]:
        reasons = [] if built() else ["was built without its kernels (ESM_FAST_CUDA=off); see docs/kernels/cuda.md"]
        _, problem = devices()
        return reasons + [problem] * (problem is not None)

    def launch(self, launch: Launch) -> None:
        cuda = _library()
        lead = next(argument for argument in launch.arguments if isinstance(argument, torch.Tensor))
        _bind(lead.device.index)
        kernel = self._kernel(launch, lead.device)
        _, values = parameters(launch)
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid = (*launch.grid, *[1] * (3 - len(launch.grid)))
        stream = ctypes.c_void_p(torch.cuda.current_stream(lead.device).cuda_stream)
        code = cuda.cuLaunchKernel(
            kernel, *map(ctypes.c_uint, grid), *map(ctypes.c_uint, (launch.block, 1, 1, launch.shared)),
            stream, pointers, None,
        )  # fmt: skip
        _check(cuda, code, f"launching {launch.kernel}")

    def _kernel(self, launch: Launch, device: torch.device) -> ctypes.c_void_p:
        name = image_name(launch.source, SCALARS[launch.dtype], torch.cuda.get_device_capability(device))
        with self._lock:
            if (name, launch.kernel) not in self._kernels:
                _require_no_capture(launch.kernel)
                self._kernels[name, launch.kernel] = _load(name, launch.kernel)
            kernel = self._kernels[name, launch.kernel]
        if launch.shared > _SHARED_UNASKED:
            cuda, index = _library(), torch.cuda.current_device() if device.index is None else device.index
            code = cuda.cuKernelSetAttribute(_MAX_DYNAMIC_SHARED, launch.shared, kernel, index)
            _check(cuda, code, f"{launch.shared} bytes of shared memory for {launch.kernel}")
        return kernel


def _bind(index: int) -> None:
    """Makes torch's context of a device current in this thread. A fresh thread has none: torch makes one current at its
    first own call, which may come after ours."""
    cuda, current, context = _library(), ctypes.c_void_p(), _context(index)
    _check(cuda, cuda.cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent")
    if current.value != context.value:
        _check(cuda, cuda.cuCtxSetCurrent(context), "cuCtxSetCurrent")


@functools.cache
def _context(index: int) -> ctypes.c_void_p:
    """The device's primary context, which is torch's; it is held as long as the process lives, as torch does."""
    cuda, device, context = _library(), ctypes.c_int(), ctypes.c_void_p()
    _check(cuda, cuda.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    _check(cuda, cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    return context


def _require_no_capture(kernel: str) -> None:
    """Raises DriverError while a CUDA graph is captured: loading code then fails, and ends the capture."""
    if torch.cuda.is_current_stream_capturing():
        raise DriverError(f"{kernel} cannot be loaded while a CUDA graph is captured: run the same once before it")


@functools.cache
def _image(name: str) -> ctypes.c_void_p:
    """A file of the archive as the driver's library; it holds for every device."""
    with zipfile.ZipFile(CUBINS) as archive:
        data = archive.read(name)
    cuda, library = _library(), ctypes.c_void_p()
    code = cuda.cuLibraryLoadData(ctypes.byref(library), data, None, None, 0, None, None, 0)
    _check(cuda, code, f"loading {name}")
    return library


def _load(name: str, kernel: str) -> ctypes.c_void_p:
    cuda, handle = _library(), ctypes.c_void_p()
    _check(cuda, cuda.cuLibraryGetKernel(ctypes.byref(handle), _image(name), kernel.encode()), f"{kernel} in {name}")
    return handle
