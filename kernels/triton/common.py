"""What the Triton kernels share: when they can run, how they are launched and audited, and small device functions.

Kernels accumulate in fp32 whatever they load. With TRITON_INTERPRET=1 in the environment before Triton is imported they
run on CPU tensors in Triton's interpreter: far too slow to use, but how their arithmetic is tested without a GPU.
"""

import contextlib
import functools
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from esm_fast.ops import registry
from esm_fast.ops.common import aligned
from esm_fast.ops.registry import Request

BACKEND = "triton"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # compute capabilities that are compiled and audited
OLDEST_ARCH = (8, 0)
MAX_HEAD_DIM = 128
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}  # Triton's names of the dtypes
# Every dtype and how its matrices are multiplied; see `precision`.
PRECISIONS = [*((dtype, "ieee") for dtype in NAMES), (torch.float32, "tf32")]


elsewhere: int | None = None  # the capability that launches on CPU tensors are compiled for; see elsewhere.py


def interpreted() -> bool:
    return triton.knobs.runtime.interpret


@registry.runs_on
def _in_its_place() -> object:
    """Of a GPU: the interpreter, or nothing, for kernels that are compiled only."""
    return "interpreter" if interpreted() else elsewhere


def why_not(request: Request) -> list[str]:
    """What keeps the Triton kernels from running a request; see `registry.Request`."""
    reasons = []
    if request.device == "cuda" and request.arch < OLDEST_ARCH:
        reasons.append("needs compute capability {}.{}, this GPU has {}.{}".format(*OLDEST_ARCH, *request.arch))
    on_cpu = request.device == "cpu" and (interpreted() or elsewhere is not None)
    if request.device != "cuda" and not on_cpu:
        reasons.append(f"needs a CUDA device (or TRITON_INTERPRET=1 on the CPU), the tensors are on {request.device}")
    if request.device == "cuda" and torch.cuda.is_available():  # of a GPU that is elsewhere nothing is known
        reasons += _not_here()
    if request.dtype not in NAMES:
        reasons.append(f"has float16, bfloat16 and float32, not {str(request.dtype).removeprefix('torch.')}")
    if request.head_dim is not None and request.head_dim > MAX_HEAD_DIM:
        reasons.append(f"needs a head_dim up to {MAX_HEAD_DIM}, this is {request.head_dim}")
    return reasons


@functools.cache
def _not_here() -> list[str]:
    """What Triton lacks on this machine: a C compiler builds what loads and launches its kernels, into its cache."""
    folder = Path(triton.knobs.cache.dir)
    reasons = []
    if triton.knobs.build.impl is None and not any(folder.glob("*/cuda_utils*.so")):  # or built before
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            reasons.append("needs a C compiler at run time: install gcc, or set CC")
        scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
        if not (header := Path(sysconfig.get_paths(scheme)["include"]) / "Python.h").exists():
            reasons.append(f"needs {header} at run time: install Python's headers (python3-dev)")
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError:
        reasons.append(f"cannot write its cache {folder}: set TRITON_CACHE_DIR to a folder of your own")
    return reasons


@contextlib.contextmanager
def first_launches_told() -> Iterator[None]:
    """What fails while a CUDA graph is captured says that a kernel's first launch cannot be part of one."""
    try:
        yield
    except Exception as error:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a Triton kernel failed while a CUDA graph was captured ({error}): run the same once before the "
                "capture, since a kernel's first launch compiles and loads it"
            ) from error
        raise


def yields(request: Request) -> list[str]:
    """Nobody gets unasked what has never run on a GPU, nor the interpreter, which is a test bench."""
    where = "in Triton's interpreter" if request.device == "cpu" else "on a GPU, where it has never run"
    return [f"only by name {where}"]


def implements(op_name: str, *, backward=None, train=None):
    """`registry.implements` for this backend.

    Triton launches on the current device: it is made that of the tensors. In a backward autograd sees to that.
    Tensors begin at a multiple of 16 bytes, as they did when the kernels were compiled beforehand.
    """

    def on_its_device(function):
        @functools.wraps(function)
        def run(*arguments):
            with torch.cuda.device_of(arguments[0]), first_launches_told():
                return function(*aligned(arguments))

        return run

    def backward_of(arguments, kept, grad_outputs):
        with first_launches_told():
            return backward(aligned(arguments), kept, aligned(grad_outputs))

    return lambda forward: registry.implements(
        op_name,
        backend=BACKEND,
        why_not=why_not,
        yields=yields,
        backward=backward and backward_of,
        train=train and on_its_device(train),
    )(on_its_device(forward))


def capability(tensor: torch.Tensor) -> int:
    """The architecture whose tile sizes to use; the interpreter takes the oldest one's."""
    if not tensor.is_cuda:
        there = elsewhere or ARCHITECTURES[0]
    else:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        there = 10 * major + minor
    return max(known for known in ARCHITECTURES if known <= there)


def precision() -> str:
    """How fp32 matrices are multiplied: exactly, or in tf32 where `torch.backends` allows it. Half ones do not ask."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def padded(size: int) -> int:
    """The block that holds one row of `size`: a power of two, and what `tl.dot` takes at least."""
    return max(16, triton.next_power_of_2(size))


def require_one_dtype(*weights: torch.Tensor) -> None:
    if len({weight.dtype for weight in weights}) > 1:
        raise ValueError(f"the Triton kernels take matrices of one dtype, got {[str(w.dtype) for w in weights]}")


@dataclass(frozen=True)
class Spec:
    """One compilation of one kernel as it ships: what the audit compiles for an architecture without a GPU.

    signature: every parameter of the kernel in order, by Triton's type names ("*fp16", "i32", "fp32", "constexpr").
    Pointers are aligned to 16 bytes and integers are not specialised.
    gemm: it must use the tensor cores. direction: "fwd" or "bwd".
    """

    kernel_name: str
    jit_fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    gemm: bool
    direction: str
    dtype: str


def spec(kernel, types: str, constexprs: dict, config, *, direction: str, dtype: torch.dtype) -> Spec:
    """A Spec from the types of the parameters that are no constexprs, in order and separated by spaces."""
    how = constexprs.get("PRECISION")  # which products of matrices alone have
    constexprs = constexprs | config.tiles
    given = iter(types.split())
    signature = {name: "constexpr" if name in constexprs else next(given) for name in kernel.arg_names}
    return Spec(
        kernel.__name__,
        kernel,
        signature,
        constexprs,
        config.num_warps,
        config.num_stages,
        how is not None and (dtype, how) != (torch.float32, "ieee"),
        direction,
        NAMES[dtype],
    )


@triton.jit
def gelu(x):
    """The exact GELU, by erf."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x):
    """Its derivative: the normal distribution function plus x times the normal density."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
