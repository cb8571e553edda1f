"""The emulator from Python: builds csrc/cuda/ for it, and executes launches on CPU tensors."""

import ctypes
import hashlib
import os
import struct
import subprocess
from pathlib import Path

import torch
from building import ROOT, at_once, compiled
from esm_fast.kernels.cuda.launch import SCALARS, Launch, parameters

HERE = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cuda"
CORE = ["threads", "memory", "interface"]
DTYPES = tuple(SCALARS.values())
QUICK = ("-O1",)
LIBRARY, PROGRAM = "emulator.so", "replay"


class _Traffic(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("requests", "sectors", "bytes", "narrow_bytes", "distinct_bytes")]


class _Result(ctypes.Structure):
    _fields_ = [("loads", _Traffic), ("stores", _Traffic), ("shared_bytes", ctypes.c_uint64)]


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_char_p) for name in ("kernel", "scalar", "signature")),
        *((name, ctypes.c_uint * 3) for name in ("grid", "block")),
        ("dynamic_bytes", ctypes.c_uint64),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("tensors", ctypes.POINTER(_Tensor)),
        ("tensor_count", ctypes.c_uint64),
        ("seed", ctypes.c_uint),
        ("count_traffic", ctypes.c_uint),
    ]


def shipped() -> list[Path]:
    return sorted(SOURCES.glob("*.cu"))


def cached(sources: list[Path], flags=QUICK, **options) -> Path:
    """`build` in a folder of the checkout's build/ that is known by all that goes into it."""
    texts = [path.read_bytes() for path in [*sources, *sorted(SOURCES.glob("*.cuh")), *sorted(HERE.glob("*.[ch]*"))]]
    name = hashlib.sha256(b"\0".join([repr((flags, options)).encode(), *texts])).hexdigest()[:16]
    folder = ROOT / "build" / "cuda_emulator" / name
    built = folder / (LIBRARY if options.get("library", True) else PROGRAM)
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        build(folder, sources, flags, **options)
    return built


def build(folder: Path, sources: list[Path], flags=QUICK, dtypes=DTYPES, library=True) -> Path:
    """Compiles the emulator with these kernels: into a library for Python, or a program that replays launches."""
    common = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC", "-c", *flags, f"-I{HERE}", f"-I{SOURCES}"]
    bare = [flag for flag in common if flag != "-fsanitize=thread"]

    def of_kernel(source, scalar):
        # A namespace of its own, since several files have functions of one name.
        defines = ["-DESM_EMULATE_CUDA", f"-DESM_SCALAR={scalar}", f"-Desm=esm_{source.stem}_{scalar}"]
        return compiled(folder / f"{source.stem}.{scalar}.o", *common, *defines, "-x", "c++", source)

    def of_core(name):
        watched = ["-DESM_TSAN"] * ("-fsanitize=thread" in flags)
        return compiled(folder / f"{name}.o", *bare, *watched, HERE / f"{name}.cpp")

    core = CORE if library else [*CORE, "replay"]
    jobs = [lambda s=source, d=dtype: of_kernel(s, d) for source in sources for dtype in dtypes]
    objects = at_once(*jobs, *(lambda n=name: of_core(n) for name in core))
    kind = ["-shared"] if library else []
    return compiled(folder / (LIBRARY if library else PROGRAM), *kind, *flags, *objects)


class EmulatorError(AssertionError):
    """A kernel did what a GPU would not forgive; the message says which, where and what."""


class Emulator:
    """An executor of launches on CPU tensors; see `kernels/cuda/launch.py`.

    seed: of the order in which blocks and threads run. traffic: whether launches are counted in `counted`.
    """

    device = "cpu"

    def __init__(self, library: Path, seed: int = 0, traffic: bool = False):
        self._library = ctypes.CDLL(str(library))
        self._library.emulator_launch.restype = ctypes.c_char_p
        self.seed, self.traffic = seed, traffic
        self.counted: list[tuple[Launch, _Result]] = []

    def why_not(self) -> list[str]:
        return []

    def launch(self, launch: Launch) -> None:
        signature, values = parameters(launch)
        addresses = [ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values]
        tensors = [_Tensor(tensor.data_ptr(), tensor.nbytes) for tensor in tensors_of(launch)]
        described = _Launch(
            launch.kernel.encode(),
            SCALARS[launch.dtype].encode(),
            signature.encode(),
            (ctypes.c_uint * 3)(*_three(launch.grid)),
            (ctypes.c_uint * 3)(launch.block, 1, 1),
            launch.shared,
            (ctypes.c_void_p * len(values))(*addresses),
            (_Tensor * len(tensors))(*tensors),
            len(tensors),
            self.seed,
            self.traffic,
        )
        result = _Result()
        error = self._library.emulator_launch(ctypes.byref(described), ctypes.byref(result))
        if error:
            raise EmulatorError(error.decode())
        if self.traffic:
            self.counted.append((launch, result))


class Recorder(Emulator):
    """Also writes every launch to a file, with what its tensors hold before it, for the program that replays them."""

    def __init__(self, library: Path, path: Path):
        super().__init__(library)
        self.path = path
        path.write_bytes(b"")

    def launch(self, launch: Launch) -> None:
        with self.path.open("ab") as file:
            file.write(recorded(launch))
        super().launch(launch)


def recorded(launch: Launch) -> bytes:
    """A launch as replay.cpp reads it."""
    signature, values = parameters(launch)
    tensors = tensors_of(launch)
    places = {tensor.data_ptr(): i for i, tensor in enumerate(tensors)}
    parts = [_text(launch.kernel), _text(SCALARS[launch.dtype]), _text(signature)]
    parts.append(struct.pack("<6IQI", *_three(launch.grid), launch.block, 1, 1, launch.shared, len(tensors)))
    for tensor in tensors:
        parts += [struct.pack("<Q", tensor.nbytes), tensor.flatten().view(torch.uint8).numpy().tobytes()]
    for letter, value in zip(signature, values, strict=True):
        if letter.isupper():
            parts.append(struct.pack("<q", places[value.value] if value.value else -1))
        else:
            parts.append(bytes(value).ljust(8, b"\0"))
    return b"".join(parts)


def replay(program: Path, recording: Path, seed: int = 0) -> subprocess.CompletedProcess:
    """Runs recorded launches in a program that a sanitizer watches."""
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [str(program), str(recording), str(seed)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **options})


def tensors_of(launch: Launch) -> list[torch.Tensor]:
    """The different tensors among the arguments; an empty one has no address and is passed as null."""
    given = [argument for argument in launch.arguments if isinstance(argument, torch.Tensor) and argument.nbytes]
    return list({tensor.data_ptr(): tensor for tensor in given}.values())


def _three(sizes) -> tuple[int, ...]:
    return (*sizes, *[1] * (3 - len(sizes)))


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()
