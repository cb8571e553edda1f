"""Compiles the CUDA kernels beside this file to cubins: with nvcc, or with NVRTC from PyPI and no toolkit at all.

A cubin is one file for one dtype and one architecture, and holds machine code alone: nothing is linked, no CUDA library
is needed to import the package, and the driver loads what it runs. Used by setup.py, the audit and the tests.

    ESM_FAST_CUDA_ARCH=90 python csrc/cuda/build.py kernels/cuda/cubins.zip nvrtc
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parent
ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
PTX = 90
SCALARS = ("f32", "f16", "bf16")
NVRTC = {
    "nvidia-cuda-nvrtc-cu12": "12.9.86",
    "nvidia-cuda-runtime-cu12": "12.9.79",
    "nvidia-cuda-nvcc-cu12": "12.9.86",
    "nvidia-cuda-cccl-cu12": "12.9.27",
}
_LIBRARIES = ("cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13")
_HEADERS = ("cuda_runtime", "cuda_nvcc", "cuda_cccl", "cu13")


class Unit(NamedTuple):
    """One compilation: a file, for one dtype and one architecture."""

    source: Path
    scalar: str
    arch: int
    is_ptx: bool = False  # which the driver of a newer GPU compiles

    @property
    def target(self) -> str:
        return f"{'compute' if self.is_ptx else 'sm'}_{self.arch}"

    @property
    def file_name(self) -> str:
        return f"{self.source.stem}.{self.scalar}.{self.target}.{'ptx' if self.is_ptx else 'cubin'}"

    @property
    def options(self) -> list[str]:
        return ["--std=c++17", f"-DESM_SCALAR={self.scalar}", f"--gpu-architecture={self.target}"]


def units(architectures=ARCHITECTURES) -> list[Unit]:
    """All machine code that ships. bf16 has no hardware before sm_80."""
    sources = sorted(SOURCES.glob("*.cu"))
    every = (Unit(*unit) for unit in product(sources, SCALARS, architectures))
    return [unit for unit in every if unit.scalar != "bf16" or unit.arch >= 80]


def ptx_units() -> list[Unit]:
    return [Unit(*unit, PTX, True) for unit in product(sorted(SOURCES.glob("*.cu")), SCALARS)]


class CompileError(RuntimeError):
    """A kernel does not compile, or there is nothing to compile it with; the message is the compiler's."""


class Nvrtc:
    """NVRTC of PyPI's wheels with the headers of its sisters: 12.9, the last that compiles for sm_70, or 13, which a
    torch for CUDA 13 brings."""

    def __init__(self):
        spec = importlib.util.find_spec("nvidia")
        roots = [Path(root) for root in (spec.submodule_search_locations if spec else [])]
        # CUDA 12 has a folder a package, CUDA 13 one for all.
        libraries = [path for place in _LIBRARIES for root in roots for path in root.glob(place)]
        self.headers = [root / name / "include" for root in roots for name in _HEADERS]
        if not libraries or not any((folder / "mma.h").exists() for folder in self.headers):
            raise CompileError(f"NVRTC is not installed: pip install {' '.join(NVRTC)}")
        self._library = ctypes.CDLL(str(libraries[0]))
        self.architectures = tuple(arch for arch in ARCHITECTURES if arch in self._known())

    def compile(self, unit: Unit) -> bytes:
        call, program = self._call, ctypes.c_void_p()
        text = unit.source.read_bytes()
        call("CreateProgram", ctypes.byref(program), text, unit.source.name.encode(), 0, None, None)
        try:
            folders = [SOURCES, *self.headers, *(folder / "cccl" for folder in self.headers)]
            options = [*unit.options, *(f"-I{folder}" for folder in folders if folder.exists())]
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self._library.nvrtcCompileProgram(program, len(options), array):
                raise CompileError(f"{unit.file_name}: {self._get(program, 'ProgramLog').decode()}")
            return self._get(program, "PTX" if unit.is_ptx else "CUBIN")
        finally:
            call("DestroyProgram", ctypes.byref(program))

    def _known(self) -> list[int]:
        """The architectures that this release compiles for."""
        count = ctypes.c_int()
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", found)
        return list(found)

    def _get(self, program, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw[: size.value]

    def _call(self, name: str, *arguments) -> None:
        if code := getattr(self._library, f"nvrtc{name}")(*arguments):
            raise CompileError(f"nvrtc{name} failed with error {code}")


class Nvcc:
    """The toolkit's compiler: CUDA 13 compiles for sm_75 and newer, 12.x for sm_70 too."""

    def __init__(self):
        self.path = shutil.which("nvcc")
        if not self.path:
            raise CompileError("nvcc is not on PATH")
        known = subprocess.run([self.path, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        self.architectures = tuple(arch for arch in ARCHITECTURES if f"sm_{arch}" in known)

    def compile(self, unit: Unit) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / unit.file_name
            kind = "-ptx" if unit.is_ptx else "-cubin"
            command = [self.path, *unit.options, f"-I{SOURCES}", kind, "-o", output, unit.source]
            done = subprocess.run([*map(str, command)], capture_output=True, text=True)
            if done.returncode:
                raise CompileError(f"{unit.file_name}: {done.stderr}")
            return output.read_bytes()


COMPILERS = {"nvcc": Nvcc, "nvrtc": Nvrtc}


def compiler_of(choice: str):
    """The compiler that ESM_FAST_CUDA names: off (None), nvcc, nvrtc, or auto, the first of them that is there."""
    if choice not in ("auto", "off", *COMPILERS):
        raise CompileError(f"ESM_FAST_CUDA is {choice!r}: choose from auto, nvcc, nvrtc and off")
    if choice in COMPILERS:
        return COMPILERS[choice]()
    for maker in COMPILERS.values() if choice == "auto" else ():
        try:
            return maker()
        except CompileError as problem:
            print(f"ESM_FAST_CUDA=auto: {problem}", file=sys.stderr)
    return None


def chosen_architectures(compiler, named: str = "") -> tuple[int, ...]:
    """Those of ESM_FAST_CUDA_ARCH, such as "90" or "80,90", that ship; without a name, all that the compiler knows."""
    if not named:
        return compiler.architectures
    known = {str(arch): arch for arch in compiler.architectures}
    wanted = [part.strip() for part in named.replace(".", "").split(",")]
    if strange := [part or "nothing" for part in wanted if part not in known]:
        raise CompileError(
            f"ESM_FAST_CUDA_ARCH is {named!r}: {strange[0]} is none of {', '.join(known)}, of this compiler"
        )
    return tuple(known[part] for part in wanted)


def build(archive: Path, compiler, named: str = "") -> None:
    """Writes everything that ships, as far as the compiler knows the architectures, into a zip file; with names of
    architectures code for these alone, without PTX for newer ones."""
    chosen = units(chosen_architectures(compiler, named)) + ([] if named else ptx_units())
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file, ThreadPoolExecutor() as pool:
        for unit, image in zip(chosen, pool.map(compiler.compile, chosen), strict=True):
            file.writestr(unit.file_name, image)


if __name__ == "__main__":
    build(Path(sys.argv[1]), compiler_of(sys.argv[2]), os.environ.get("ESM_FAST_CUDA_ARCH", ""))
