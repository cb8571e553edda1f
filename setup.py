"""Builds the one C++ extension, `esm_fast._C`, with CMake. Needs neither torch nor CUDA.

ESM_FAST_CUDA=auto, nvcc or nvrtc also compiles the CUDA kernels, which the driver loads from a file of the package; by
default they are left out, and with them minutes of compilation and 200 MB of compiler. ESM_FAST_CUDA_ARCH=90 compiles
for that architecture alone. See docs/kernels/cuda.md.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA = os.environ.get("ESM_FAST_CUDA", "off")


def cuda_build():
    """csrc/cuda/build.py as a module."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc" / "cuda" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and leaves the module where setuptools expects it."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / "cmake"
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            # An isolated build has its own ninja, at a new path each time: forget the last build's.
            "-UCMAKE_MAKE_PROGRAM",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(work)], check=True)
        self.build_cuda()

    def build_cuda(self):
        build = cuda_build()
        compiler = build.compiler_of(CUDA)
        if compiler is not None:
            package = ROOT / "kernels" if self.inplace else Path(self.build_lib) / "esm_fast" / "kernels"
            named = os.environ.get("ESM_FAST_CUDA_ARCH", "")
            build.build(package / "cuda" / "cubins.zip", compiler, named)


setup(
    packages=[
        *find_packages(include=["esm_fast", "esm_fast.*"]),
        "esm_fast.kernels",
        *(f"esm_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    # The kernels stand at the top level, beside csrc, and are imported as `esm_fast.kernels`.
    package_dir={"esm_fast": "esm_fast", "esm_fast.kernels": "kernels"},
    package_data={
        "esm_fast": ["*.pyi", "py.typed"],
        "esm_fast.models": ["*.safetensors"],
        "esm_fast.kernels.cuda": ["*.csv"],
        "esm_fast.kernels.triton": ["*.csv"],
    },
    # An isolated build brings its own compiler along.
    setup_requires=[f"{name}=={version}" for name, version in cuda_build().NVRTC.items()] if CUDA == "nvrtc" else [],
    ext_modules=[Extension("esm_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
