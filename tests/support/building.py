"""C++ built by a test: programs, and the extension in a copy of the package, with flags of the test's own."""

import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cpu" / "kernels.cpp"
BINDINGS = ROOT / "csrc" / "cpu" / "bindings"


def compiled(output: Path, *arguments) -> Path:
    command = ["g++", "-std=c++17", "-pthread", *map(str, arguments), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return output


def at_once(*jobs):
    """Runs functions on two threads, each of which waits for a compiler or a program; returns their results."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def package(folder: Path, levels: dict[str, str], *flags: str) -> Path:
    """A copy of esm_fast in `folder` whose extension is built with these flags and, per level, those of the level.

    Run Python in `folder`: it is then found before the installed package.
    """
    copy = folder / "esm_fast"
    rest = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(ROOT / "esm_fast", copy, ignore=rest)
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=rest)
    pybind11 = Path(torch.__file__).parent / "include"  # torch brings its own copy
    built_in = "-DESM_LEVELS=" + " ".join(f"X({level})" for level in levels)
    common = ["-c", "-fPIC", "-fvisibility=hidden", f"-I{pybind11}", f"-I{sysconfig.get_paths()['include']}", *flags]

    def of_level(level):
        kernel = ["-ffp-contract=off", "-fno-math-errno", f"-DESM_LEVEL={level}", *levels[level].split()]
        return compiled(folder / f"{level}.o", *common, *kernel, KERNELS)

    def of_file(source):
        quick = ["-O0"] * (source.stem == "bindings")  # pybind11 is much to compile, and does no work
        return compiled(folder / f"{source.parent.name}_{source.stem}.o", *common, *quick, built_in, source)

    # What is compiled for longest comes first.
    sources = sorted({*(ROOT / "csrc").rglob("*.cpp")} - {KERNELS, *BINDINGS.glob("*.cpp")})
    sources = [_ops_bindings(folder), *sorted(sources, key=lambda source: source.stem != "bindings")]
    jobs = [lambda i=level: of_level(i) for level in reversed(levels)]
    jobs += [lambda i=source: of_file(i) for source in sources]
    compiled(copy / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "-shared", *flags, *at_once(*jobs))
    return copy


def _ops_bindings(folder: Path) -> Path:
    """The ops' bindings as one source: each alone would compile pybind11 once more, for minutes in all."""
    source = folder / "ops" / "bindings.cpp"
    source.parent.mkdir()
    files = sorted(BINDINGS.glob("*.cpp"))
    named = (f'#define binding binding_{file.stem}\n#include "{file}"\n#undef binding\n' for file in files)
    source.write_text("".join(named))
    return source
