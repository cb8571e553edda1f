"""Builds the one C++ extension, `esm_fast._C`, with CMake. Needs neither torch nor CUDA."""

import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


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


setup(
    packages=[
        "esm_fast",
        "esm_fast.cli",
        "esm_fast.compat",
        "esm_fast.kernels",
        "esm_fast.kernels.cpu",
        "esm_fast.kernels.cuda",
        "esm_fast.kernels.triton",
        "esm_fast.models",
        "esm_fast.ops",
        "esm_fast.train",
        "esm_fast.writers",
    ],
    # The kernels stand at the top level, beside csrc, and are imported as `esm_fast.kernels`.
    package_dir={"esm_fast": "esm_fast", "esm_fast.kernels": "kernels"},
    package_data={"esm_fast.kernels.triton": ["*.csv"]},
    ext_modules=[Extension("esm_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
