"""The AMX level where there is no AMX: its own source on an emulator of the tile instructions, and its compiled code.

What this cannot show: that a real CPU agrees with the emulator, and any speed (docs/cpu.md).
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
from building import ROOT, at_once, package
from cpu_levels import FLAGS

from esm_fast import _C

CPU = ROOT / "csrc" / "cpu"
NATIVE = ROOT / "tests" / "proof" / "native"
COMPILE = ["g++", "-std=c++17", "-ffp-contract=off", "-fno-math-errno"]
AMX = FLAGS["amx"].split()
KERNEL_TESTS = ["test_cpu.py", "test_cpu_edges.py", "test_cpu_training.py", "test_stack.py", "test_int8.py"]
EMULATED = [*AMX, "-DESM_EMULATE_AMX", "-DESM_LEVEL=amx"]

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
needs_avx512 = pytest.mark.skipif(
    "avx512bf16" not in _C.isas(), reason="the emulator stands in for the tiles alone: the rest needs AVX512_BF16"
)


def compiled(output, *arguments):
    done = subprocess.run([*COMPILE, *map(str, arguments), "-o", str(output)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return output


# --- on the emulator -------------------------------------------------------------------------------------------------


def native(folder, *flags, sources=CPU):
    """tests/proof/native/amx.cpp, on the headers of a folder."""
    return compiled(folder / "amx.out", *EMULATED, "-O1", *flags, "-I", sources, NATIVE / "amx.cpp")


@needs_avx512
def test_tiles_and_the_emulator_against_plain_loops(tmp_path):
    """With bounds checked, so that nothing is read beyond the rows; and every misuse ends in its own message."""
    program = native(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "right\n", done.stdout + done.stderr
    faults = {
        "unconfigured": "without a configuration",
        "released": "without a configuration",
        "left out": "the configuration leaves out",
        "palette": "only palette 1",
        "reserved": "reserved bytes",
        "too many rows": "at most 16 rows",
        "rows too long": "at most 16 rows of 64 bytes",
        "rows without bytes": "rows and bytes, or neither",
        "ninth tile": "eight tiles",
        "same tile": "three different tiles",
        "inputs": "disagree on the inputs",
        "rows": "disagree on the rows",
        "outputs": "disagree on the outputs",
        "odd bytes": "multiples of 4 bytes",
    }
    for fault, message in faults.items():
        done = subprocess.run([program, fault], capture_output=True, text=True)
        assert done.returncode and message in done.stderr, (fault, done.stderr)


MUTANTS = {
    "a stride too long": ("amx.h", "_tile_stream_loadd(4, upper, stride)", "_tile_stream_loadd(4, upper, stride + 2)"),
    "the wrong half of a panel": ("amx.h", "_tile_loadd(7, right", "_tile_loadd(7, left"),
    "the wrong half, further in": ("amx.h", "_stream_loadd(7, right", "_stream_loadd(7, left"),
    "lower rows from the upper half": ("amx.h", "upper + kRegisterRows * stride", "upper"),
    "inputs beyond the row": ("amx.h", "if (in - k < kInputs)", "if (false)"),
    "inputs of the next part": ("amx.h", "in - first * kInputs < steps * kInputs", "true"),
    "rows beyond the tile": ("amx.h", "lower = height - upper;", "lower = height > upper ? kRegisterRows : 0;"),
    "another height's configuration": ("amx.h", "if (height == configured_height)", "if (configured_height)"),
    "no epilogue for the last tile": (
        "amx.h",
        "products.flush();\n    last.advance(height, finish);\n",
        "products.flush();\n",
    ),
    "an epilogue cut short": ("amx.h", "last.advance(height, finish);\n                last =", "last ="),
    "sums not stored": ("amx.h", "if (last) _tile_stored(2, last + kRegisterRows * last_ld, stride);", ""),
    "sums that begin from 0 in every pass": ("amx.h", "pass ? rest : nullptr", "nullptr"),
    "bytes that begin anew": ("amx_int8.h", "group == first ? from : to", "group == first ? from : nullptr"),
    "bytes that begin from 0 in every pass": ("amx_int8.h", "pass ? rest : nullptr", "nullptr"),
    "a group scaled short": ("amx_int8.h", "        scaling_.advance(height_);\n", ""),
    "another group's scales": ("amx_int8.h", "scales_of(rows, in_) + group", "scales_of(rows, in_) + first"),
    "bytes uncorrected": ("amx_int8.h", "_tile_loadd(2, corrections, 0);", "_tile_zero(2);"),
    "bytes not stored": ("amx_int8.h", "if (last) _tile_stored(3, last + kBelow + kRegisterRows, kStride);", ""),
    "no epilogue for the last tile of bytes": (
        "amx_int8.h",
        "scaled();\n        finishing_.advance(height_, *finish_);\n",
        "scaled();\n",
    ),
    "bytes finished twice": ("amx_int8.h", "height_, column, known_rows}", "height_, column, 0}"),
    "another height's sums": ("amx.h", "flush(), configure(height);", "configure(height);"),
    "another width's sums": ("amx.h", " || has.right != has_.right", ""),
    "sums that begin from what is left": ("amx.h", "                    _tile_zero(3);", "                    ;"),
    "inputs of the pass before": ("amx.h", "lda) + first * kInputs", "lda)"),
    "rows finished twice": ("amx.h", "order.known_rows(tile)}", "0}"),
    "a softmax cut short": ("attention.h", "        softmax.advance(kMost * padded);\n", ""),
    "another tile's inverse": (
        "attention.h",
        "inverse_of_last = inverse[summed % 3]",
        "inverse_of_last = inverse[tile % 3]",
    ),
    "another tile's weights": ("attention.h", "weights + summed % 2 * size", "weights + tile % 3 % 2 * size"),
    "queries of the next head": ("attention.h", "if (inputs == dim) return;", "return;"),
    "weights that are denormal": ("vec.h", "_mm512_set1_ps(-125.0f)", "_mm512_set1_ps(-127.0f)"),
    "keys that are padding": ("attention.h", "scores[i] = -__builtin_inff();", ";"),
    "values of one row": ("attention.h", "load_row(from + ld, dim - column)", "load_row(from, dim - column)"),
    "keys out of order": ("attention.h", "r[i + 4] = even_quarters(t[i + 4], t[i + 12])", "r[i + 4] = r[i]"),
    "tiles kept": ("amx.h", "if (configured_height) _tile_release();", ""),
    "tiles kept by the pool": ("work.h", "        release_tiles();\n", ""),
    "an emulator with one chain": ("amx_emulator.h", "halves[half][n]", "halves[0][n]"),
    "an emulator with denormals": ("amx_emulator.h", "bits &= bits & 0x7f800000u ? 0xffffffffu : 0x80000000u;", ""),
}


@needs_avx512
def test_the_checks_bite(tmp_path):
    """Each planted mistake must be found. Bounds are checked where that is what finds it."""

    def survives(name):
        file, old, new = MUTANTS[name]
        folder = tmp_path / name.replace(" ", "_")
        shutil.copytree(CPU, folder)
        text = (folder / file).read_text()
        assert old in text, name
        (folder / file).write_text(text.replace(old, new))
        # -Og: compiled in a third of the time of -O1, and as fast.
        bounds = ["-fsanitize=address"] * (name == "rows beyond the tile")
        program = native(folder, "-Og", *bounds, sources=folder)
        done = subprocess.run([program], capture_output=True, text=True)
        assert "wrong: " in done.stdout or "AddressSanitizer" in done.stderr or not done.returncode, done.stderr
        return done.returncode == 0

    names = list(MUTANTS)
    survivors = [
        name for name, alive in zip(names, at_once(*(lambda n=n: survives(n) for n in names)), strict=True) if alive
    ]
    assert not survivors


@needs_avx512
def test_the_level_passes_the_tests_of_every_level(tmp_path):
    """An extension with this level alone, emulated, in a copy of the package; then the kernels' own tests on it."""
    copy = package(tmp_path, {"amx": FLAGS["amx"]}, "-O1", "-DESM_EMULATE_AMX")
    other_levels = ("leaks_no_symbol", "environment_forces", "impossible_level", "where_8_bits_do_not_run")
    others = " and ".join(f"not {name}" for name in other_levels)
    options = ["-q", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", "-k", others]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *map(str, options),
            *(str(ROOT / "tests" / "cpu" / file) for file in KERNEL_TESTS),
        ],
        cwd=tmp_path,  # first on the path, before the installed package
        env={**os.environ, "ESM_FAST_ISA": "amx"},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
    where = subprocess.run(
        [sys.executable, "-c", "from esm_fast import _C; print(_C.__file__, _C.isas(), _C.isa())"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert where.stdout.split(maxsplit=1) == [str(next(copy.glob("_C*"))), "['amx'] amx\n"]


# --- compiled code ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
def test_tile_instructions_are_where_they_belong(tmp_path):
    """Every product of bf16 rows uses tiles, every piece of work ends by releasing them; the level below has none."""

    def functions(level):
        flags = ["-c", "-O2", "-fPIC", f"-DESM_LEVEL={level}", *FLAGS[level].split()]
        built = compiled(tmp_path / f"{level}.o", *flags, CPU / "kernels.cpp")
        listing = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", built], capture_output=True, text=True).stdout
        found: dict[str, list[str]] = {}
        for block in re.split(r"\n(?=[0-9a-f]+ <)", listing):
            name, *lines = block.splitlines()
            # A function's cold part counts as its own.
            name = name.partition("<")[2].removesuffix(">:").removesuffix(" [clone .cold]")
            instructions = (line.split("\t")[1].split()[0] for line in lines if "\t" in line)
            found.setdefault(name, []).extend(instructions)
        return found

    tiles = {"tdpbf16ps", "tileloadd", "tileloaddt1", "tilestored", "tilezero", "ldtilecfg", "tilerelease"}
    level, below = at_once(lambda: functions("amx"), lambda: functions("avx512bf16"))
    assert not any(tiles & set(body) for body in below.values())
    users = {name: body for name, body in level.items() if "tdpbf16ps" in body}
    for product in (
        "gemm<.*Gelu",
        "gemm<.*AddTo",
        "gemm<.*Project",
        r"attend[<(].*bf16",
        "Contacts<.*bf16.*add",
        "peak_of",
    ):
        assert any(re.search(product, name) for name in users), product
    assert all("ldtilecfg" in body for body in users.values())
    assert not any("vdpbf16ps" in body for body in level.values())
    pieces = [body for name, body in level.items() if re.search(r"\beach<.*_FUN\(", name)]
    assert len(pieces) > 10 and all("tilerelease" in body for body in pieces)


# --- detection -------------------------------------------------------------------------------------------------------

SAPPHIRE_RAPIDS = {
    "leaf 1 ecx": 1 << 12 | 1 << 29 | 1 << 27,
    "leaf 7 ebx": 1 << 5 | 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31,
    "leaf 7 ecx": 1 << 11,
    "leaf 7 edx": 1 << 22 | 1 << 24 | 1 << 25,
    "leaf 7.1 eax": 1 << 5,
    "saved": 0x600E7,
    "refusal": "",
}


@pytest.fixture(scope="module")
def missing(tmp_path_factory):
    program = compiled(
        tmp_path_factory.mktemp("detect") / "detect", "-I", CPU, NATIVE / "detect.cpp", CPU / "detect.cpp"
    )

    def ask(level, **changes):
        words = {**SAPPHIRE_RAPIDS, **{name.replace("_", " "): word for name, word in changes.items()}}
        words = [word if isinstance(word, str) else f"{word:x}" for word in words.values()]
        return subprocess.run([program, level, *words], check=True, capture_output=True, text=True).stdout.strip()

    return ask


def test_a_machine_with_amx_runs_every_level(missing):
    assert [missing(level) for level in FLAGS] == [""] * len(FLAGS)


def test_what_a_machine_lacks_is_named(missing):
    assert missing("amx", **{"leaf 7 edx": 0}) == "AMX-TILE, AMX-BF16, AMX-INT8"
    assert missing("amx", **{"leaf 7 edx": 1 << 24 | 1 << 25}) == "AMX-BF16"
    assert missing("amx", saved=0xE7) == missing("amx", saved=0x200E7) == "tile registers saved by the system"
    assert missing("amx", refusal="Operation not permitted") == (
        "leave to use the tile registers (Operation not permitted)"
    )
    assert missing("avx512bf16", refusal="Operation not permitted") == ""
    cascade_lake = {"leaf 7.1 eax": 0, "leaf 7 edx": 0, "saved": 0xE7}
    assert missing("avx512vnni", **cascade_lake) == "" and missing("avx512bf16", **cascade_lake) == "AVX512_BF16"
    skylake = {**cascade_lake, "leaf 7 ecx": 0}
    assert missing("avx512", **skylake) == "" and missing("avx512vnni", **skylake) == "AVX512_VNNI"
    assert missing("avx512", saved=0x7) == "512-bit registers saved by the system"
    assert missing("avx2", saved=0x3) == "256-bit registers saved by the system"
    assert missing("base", **{name: "" if name == "refusal" else 0 for name in SAPPHIRE_RAPIDS}) == ""


def test_the_extension_says_why_it_lacks_a_level():
    reasons = _C.missing_isas()
    assert reasons.keys().isdisjoint(_C.isas()) and all(reasons.values())
    for level, reason in reasons.items():
        with pytest.raises(
            ValueError, match=f"does not run the instruction set '{level}': it has no {re.escape(reason)}"
        ):
            _C.set_isa(level)
