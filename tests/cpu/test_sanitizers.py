"""The C++ under sanitizers: the extension with AddressSanitizer and UndefinedBehaviorSanitizer, the FASTA parser also
under a fuzzer, the thread pool also with ThreadSanitizer. Each build is given a planted mistake, which it must find, or
its silence would prove nothing."""

import os
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from building import ROOT, at_once, compiled, package
from cpu_levels import FLAGS

from esm_fast import _C

TESTS = ROOT / "tests"
# The shortest vectors and the best level: what lies between differs by the vectors' length alone.
LEVELS = [level for level in _C.isas() if level in ("base", _C.isas()[-1])]
BOUNDS = ["-O1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
RACES = ["-O1", "-g1", "-fsanitize=thread"]
OPTIONS = {
    # torch and Python are not instrumented: what they keep until the end is not ours to judge.
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}


def run(*command, **options):
    options["env"] = {**os.environ, **OPTIONS, **options.pop("env", {})}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=1800, **options)


@pytest.fixture(scope="module")
def needs(tmp_path_factory):
    """Skips where there is no g++, or not the sanitizer's library, or the kernel leaves it no room in memory."""

    def check(flags):
        if not shutil.which("g++"):
            pytest.skip("needs g++")
        source = tmp_path_factory.mktemp("probe") / "probe.cpp"
        source.write_text("int main() {}")
        built = run("g++", *flags, source, "-o", source.with_suffix(""))
        if built.returncode:
            pytest.skip(f"g++ cannot build with {flags}: {built.stderr.splitlines()[-1]}")
        ran = run(source.with_suffix(""))
        if ran.returncode:
            pytest.skip(f"a program built with {flags} does not start here: {ran.stderr.splitlines()[0]}")

    return check


# --- the extension ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python(needs, tmp_path_factory):
    """Runs Python with the instrumented extension, in a copy of the package."""
    needs(BOUNDS)
    folder = tmp_path_factory.mktemp("bounds")
    runnable = {level: FLAGS.get(level, "") for level in LEVELS}
    extension = next(package(folder, runnable, *BOUNDS).glob("_C*"))
    # Python itself is not built with the sanitizer, whose library then has to be there before all others; so has the
    # C++ library, where it looks for the functions that throw.
    libraries = dict(re.findall(r"(libasan|libstdc\+\+)\S* => (\S+)", run("ldd", extension).stdout))
    preload = f"{libraries['libasan']} {libraries['libstdc++']}"
    return lambda *arguments: run(sys.executable, *arguments, cwd=folder, env={"LD_PRELOAD": preload})


OWN_TESTS = {
    "test_cpu test_cpu_edges test_cpu_training test_stack test_packed test_refused": (
        "every_case or edges or bits or shorter_table or no_tensor_passes"
    ),
    "test_int8 test_packed_file test_alphabet test_batching test_data": (
        # what is long for other reasons than our C++: compression, other processes, large inputs, whole models
        "not any_shape and not full and not cut_anywhere and not flipped and not dense and not process and not fork"
        " and not model and not file_of_8 and not refused and not said and not load and not command and not convert"
        " and not fair_esms"
    ),
}


def test_the_extension_under_its_own_tests(python):
    options = ("-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml")

    def passes(names, chosen):
        files = (next(TESTS.glob(f"*/{name}.py")) for name in names.split())
        done = python("-m", "pytest", *options, "-k", chosen, *files)
        assert not done.returncode and "passed" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]

    at_once(*(lambda part=part: passes(*part) for part in OWN_TESTS.items()))
    used = python("-c", "from esm_fast import _C; print(_C.__file__)").stdout
    assert Path(used).parts[-3].startswith("bounds")


# A tensor whose storage was cut behind its back has seven rows where it says eight; offsets at an odd address.
PLANTED = """
import sys, torch
from esm_fast import _C
_C.set_isa(sys.argv[1])
rows, width = 8, 64
x, weight, result = torch.ones(rows, width), torch.ones(rows), torch.empty(1, width)
x.untyped_storage().resize_(7 * width * 4)
shift = int(sys.argv[2])
memory = bytearray(bytes(shift) + torch.tensor([0, rows], dtype=torch.int32).numpy().tobytes())
ends = torch.frombuffer(memory, dtype=torch.int32, offset=shift)
_C.pool(x=x, cu_seqlens=ends, weight=weight, result=result)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_a_read_beyond_the_rows_is_found(python, level):
    done = python("-c", PLANTED, level, "0")
    assert done.returncode and "heap-buffer-overflow" in done.stderr, done.stderr


def test_a_misaligned_read_is_found(python):
    done = python("-c", PLANTED, "base", "1")
    assert done.returncode and "misaligned address" in done.stderr, done.stderr


# --- the FASTA parser ------------------------------------------------------------------------------------------------


def test_the_fasta_parser_under_fuzzing(needs, tmp_path):
    needs(BOUNDS)
    sources = (TESTS / "proof" / "native" / "fasta_fuzz.cpp", ROOT / "csrc" / "fasta.cpp")
    program = compiled(tmp_path / "fuzz", *BOUNDS, *sources)
    seed = secrets.randbelow(1 << 32)  # other inputs each time; the bytes that go wrong are printed
    done = run(program, 2, seed)
    assert done.returncode == 0 and done.stdout.startswith("right"), done.stdout + done.stderr
    planted = run(program, "swallow")
    assert planted.returncode and "wrong for the bytes" in planted.stdout
    planted = run(program, "overrun")
    assert planted.returncode and "heap-buffer-overflow" in planted.stderr


# --- the thread pool -------------------------------------------------------------------------------------------------


def pool(folder, flags):
    return compiled(
        folder / "pool", *flags, TESTS / "proof" / "native" / "pool_stress.cpp", ROOT / "csrc" / "threads.cpp"
    )


def test_the_pool_has_no_races(needs, tmp_path):
    needs(RACES)
    program = pool(tmp_path, RACES)
    done = run(program, "threads")
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")
    planted = run(program, "race")
    assert planted.returncode and "ThreadSanitizer: data race" in planted.stderr


def test_the_pool_works_in_forked_children(needs, tmp_path):
    """ThreadSanitizer cannot follow a child that starts threads; AddressSanitizer's own locks do not survive a fork."""
    flags = ["-O1", "-fsanitize=undefined"]
    needs(flags)
    done = run(pool(tmp_path, flags), "fork")
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")
