"""What a number depends on: machine, versions, threads, and how fast a plain matrix product is at this moment."""

import datetime
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from esm_fast.files.cpuinfo import first_processor

FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
PACKAGES = ("esm_fast", "torch", "transformers", "fair-esm", "openvino", "nncf")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
LEVEL_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ESM_FAST_ISA")


def machine() -> dict[str, str]:
    """Name -> value of everything a reader needs in order to compare a number with another."""
    from esm_fast import _C

    versions = [f"Python {platform.python_version()}", *(f"{name} {installed(name)}" for name in PACKAGES)]
    at_most = torch.backends.cpu.get_cpu_capability()
    facts = {
        "CPU": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores visible",
        "instruction sets": " ".join(flag for flag in FLAGS if flag in cpu_flags()) or "unknown",
        "levels in use": " ".join([f"ours {_C.isa()}, torch {at_most}", *variables(LEVEL_VARIABLES)]),
        "threads": " ".join([str(torch.get_num_threads()), *variables(THREAD_VARIABLES)]),
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
        "versions": ", ".join(versions),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def variables(names: tuple[str, ...]) -> list[str]:
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ]


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    fields = first_processor()
    name = fields.get("model name") or platform.processor() or platform.machine()
    codes = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]  # a cloud's names say little
    return f"{name} ({', '.join(codes)})" if codes else name


def cpu_flags() -> set[str]:
    fields = first_processor()
    return set((fields.get("flags") or fields.get("Features") or "").split())


def gemm_peak(dtype: torch.dtype, n: int, repeats: int = 4) -> float:
    """FLOP/s of torch's own n x n matrix product, the best of a few: what the machine gives at this moment."""
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    out = torch.empty(n, n, dtype=torch.int32 if dtype == torch.int8 else dtype)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        multiply(a, b, out=out)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def raw_peak(dtype: torch.dtype) -> float | None:
    """FLOP/s of our GEMM on operands in the first-level cache; None where the kernels have none for the type."""
    from esm_fast import _C

    if _C.threads() != torch.get_num_threads():
        _C.set_threads(torch.get_num_threads())
    time.sleep(0.2)  # torch's threads look for more work for a while, on the cores that ours need
    try:
        return _C.peak(str(dtype).removeprefix("torch.")) * 1e9
    except ValueError:
        return None
