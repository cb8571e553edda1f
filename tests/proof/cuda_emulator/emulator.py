"""The emulator from Python: builds csrc/cuda/ for it, and executes launches on CPU tensors."""

import ctypes
import hashlib
import os
import struct
import subprocess
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from building import ROOT, at_once, compiled
from esm_fast.kernels.cuda.launch import SCALARS, Launch, parameters

HERE = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cuda"
CORE = ["threads", "fibers", "shared", "memory", "interface"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC"]
QUICK = ("-O1",)
BOUNDS = ("-Og", "-fsanitize=address,undefined", "-fno-omit-frame-pointer")  # -O1 would compile for twice as long
RACES = ("-O1", "-g1", "-fsanitize=thread")


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


class Unit(NamedTuple):
    """A file of kernels as compiled for one dtype."""

    source: Path
    scalar: str


def shipped() -> list[Unit]:
    return [Unit(source, scalar) for source in sorted(SOURCES.glob("*.cu")) for scalar in SCALARS.values()]


def loadable(units: list[Unit], flags=QUICK) -> Path:
    """These kernels and the emulator, for Python to load."""
    return _linked(units, flags, CORE, "-shared")


def program(units: list[Unit], flags) -> Path:
    """These kernels and the emulator, as a program that replays launches."""
    return _linked(units, flags, [*CORE, "replay"])


def _linked(units, flags, core, *kind) -> Path:
    objects = at_once(
        *(partial(_kernels, unit, flags) for unit in units), *(partial(_core, name, flags) for name in core)
    )
    return _cached([*flags, *kind, *objects], [])


def _kernels(unit: Unit, flags) -> Path:
    """The namespace becomes the object's own, since several files have functions of one name."""
    defines = [f"-DESM_SCALAR={unit.scalar}", f"-Desm=esm_{unit.source.stem}_{unit.scalar}", "-DESM_EMULATE_CUDA"]
    # A mutant of a shipped file lies elsewhere, and includes what the original does.
    folders = [f"-I{HERE}", f"-I{SOURCES}"]
    read = [unit.source, *SOURCES.glob("*.cuh"), *SOURCES.parent.glob("*.h"), *HERE.glob("*.h")]
    return _cached([*WARNINGS, *flags, *defines, *folders, "-c", "-x", "c++", unit.source], read)


def _core(name: str, flags) -> Path:
    """The emulator's own part, which ThreadSanitizer does not watch."""
    watched = "-fsanitize=thread" in flags
    flags = [flag for flag in flags if flag != "-fsanitize=thread"] + ["-DESM_TSAN"] * watched
    source = HERE / f"{name}.cpp"
    return _cached([*WARNINGS, *flags, "-c", source], [source, *HERE.glob("*.h")])


def _cached(arguments: list, read: list[Path]) -> Path:
    """What g++ makes of these arguments, kept in build/ under a hash of them and of the files it reads."""
    key = hashlib.sha256(repr([str(argument) for argument in arguments]).encode())
    for path in sorted(read):
        key.update(path.read_bytes())
    built = ROOT / "build" / "cuda_emulator" / key.hexdigest()[:24]
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        started = built.with_name(f"{built.name}.{os.getpid()}")
        compiled(started, *arguments).rename(built)
    return built


def figures(result: _Result) -> list[dict[str, int]]:
    """What a launch loaded, and what it stored; see Traffic in emulator.h."""
    return [{name: getattr(part, name) for name, _ in part._fields_} for part in (result.loads, result.stores)]


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
        self.path, self.launches = path, 0
        path.write_bytes(b"")

    def launch(self, launch: Launch) -> None:
        with self.path.open("ab") as file:
            file.write(recorded(launch))
        self.launches += 1
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
