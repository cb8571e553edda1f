"""Compiles the CUDA kernels for architectures that are not here and reads the facts off the machine code.

A compilation is known by a key: the hash of its code with its own headers, the options and the compiler's version. So
the committed table (kernels/cuda/audit.csv) is known to belong to the kernels as they are: whoever changes one sees its
key change, and `python tests/proof/cuda_proof/audit.py` compiles what is new.
"""

import contextlib
import csv
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from esm_fast.kernels.cuda.attention_varlen import fits, shared_bytes
from esm_fast.kernels.cuda.launch import SCALARS

ROOT = Path(__file__).resolve().parents[3]
TABLE = ROOT / "kernels" / "cuda" / "audit.csv"
NVRTC_VERSION = "12.9"  # the table's: another one generates other code


def _load_build():
    spec = importlib.util.spec_from_file_location("esm_cuda_build", ROOT / "csrc" / "cuda" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build()


class Architecture(NamedTuple):
    """Limits of CUDA's programming guide, in bytes, threads and blocks."""

    sm_shared: int
    sm_threads: int
    sm_blocks: int
    reserved_shared: int  # what the driver takes of a block's


LIMITS = {
    70: Architecture(96 << 10, 2048, 32, 0),
    75: Architecture(64 << 10, 1024, 16, 0),
    80: Architecture(164 << 10, 2048, 32, 1024),
    86: Architecture(100 << 10, 1536, 16, 1024),
    89: Architecture(100 << 10, 1536, 24, 1024),
    90: Architecture(228 << 10, 2048, 32, 1024),
    100: Architecture(228 << 10, 2048, 32, 1024),
    120: Architecture(100 << 10, 1536, 24, 1024),
}
SM_REGISTERS = 65536
_BY_TILES = ("attention_", "contact_map_")  # which attention.cuh lays out
_OF_ONE_TILE = ("attention_forward_", "contact_map_lse_", "contact_map_backward_")  # of rows of the block's own


class Facts(NamedTuple):
    """What one kernel of a compilation became. spilled: bytes of local memory and accesses to it; hmma: tensor-core
    instructions; wide: loads and stores of global memory of 16 bytes a lane; blocks: how many fit on one SM, and
    promised: how many the source says; 0 where Python declines to launch it."""

    key: str
    kernel: str
    scalar: str
    arch: int
    threads: int
    registers: int
    shared: int
    spilled: int
    instructions: int
    hmma: int
    wide: int
    blocks: int
    promised: int

    def problems(self, uses_wmma: bool = False) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled}")
        if self.blocks < self.promised:
            found.append(f"{self.blocks} blocks fit on an SM, {self.promised} are promised")
        if uses_wmma and self.scalar != "f32" and not self.hmma:
            found.append("has no tensor-core instruction")
        return found


class Declaration(NamedTuple):
    """What KERNEL(threads, blocks, name, ...) says."""

    threads: int
    blocks: int


def texts(source: Path) -> dict[Path, str]:
    """A file and the headers of ours that it includes, at any depth."""
    found, waiting = {}, [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found and path.exists():
            found[path] = path.read_text()
            waiting += [(path.parent / name).resolve() for name in re.findall(r'#include "([^"]+)"', found[path])]
    return found


def declarations(source: Path) -> dict[str, Declaration]:
    """Of the kernels in a file, by name; its constants are evaluated."""
    whole = "\n".join(reversed(texts(source).values()))
    constants: dict[str, int] = {}
    for definition in re.findall(r"constexpr int ([^;]+);", whole):
        for name, value in re.findall(r"(\w+) = ([\w+*/ ]+)(?:,|$)", definition):
            if re.fullmatch(r"[\w+*/ ]+", value) and "sizeof" not in value:
                with contextlib.suppress(NameError):  # of a template's parameter, or of the dtype
                    constants[name] = _evaluated(value, constants)
    own = source.read_text()
    found = re.findall(r"^ *KERNEL\(([\w* /]+), (\d+), (\w+),", own, re.MULTILINE)
    for macro, threads, blocks in re.findall(r"#define (\w+)\(name.*\n *KERNEL\(([\w* /]+), (\d+), name", own):
        found += [(threads, blocks, name) for name in re.findall(rf"^{macro}\((\w+),", own, re.MULTILINE)]
    return {name: Declaration(_evaluated(threads, constants), int(n)) for threads, n, name in found if name != "name"}


def _evaluated(expression: str, constants: dict[str, int]) -> int:
    return int(eval(expression.replace("/", "//"), {"__builtins__": {}}, constants))  # our own sources


def key_of(unit) -> str:
    options = [option for option in unit.options if not option.startswith("-I")]
    code = sorted((path.name, _code(text)) for path, text in texts(unit.source).items())
    parts = [NVRTC_VERSION, *options, *(text for _, text in code)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _code(text: str) -> str:
    """A source without its comments and the layout of its lines."""
    return " ".join(re.sub(r"//.*", "", text).split())


def uses_wmma(source: Path) -> bool:
    return any("mma_sync(" in text for text in texts(source).values())


def audit(unit, compiler) -> list[Facts]:
    """Compiles and reads; one Facts a kernel."""
    usage, code = disassemble(compiler.compile(unit))
    limits = LIMITS[unit.arch]
    declared = declarations(unit.source)
    if set(usage) != set(declared):
        raise RuntimeError(f"{unit.file_name} has {sorted(usage)}, the source declares {sorted(declared)}")
    rows = []
    for kernel, numbers in sorted(usage.items()):
        names = code[kernel]
        local = sum(name.startswith(("STL", "LDL")) for name in names)
        threads, promised = declared[kernel]
        shared = numbers["SHARED"] + _dynamic_shared(kernel, unit.scalar)
        rows.append(
            Facts(
                key=key_of(unit),
                kernel=kernel,
                scalar=unit.scalar,
                arch=unit.arch,
                threads=threads,
                registers=numbers["REG"],
                shared=shared,
                spilled=numbers["STACK"] + numbers["LOCAL"] + local,
                instructions=len(names),
                hmma=sum("HMMA" in name for name in names),
                wide=sum(bool(re.match(r"(LDG|STG)\b.*\.128", name)) for name in names),
                blocks=blocks_per_sm(numbers["REG"], shared, threads, limits),
                promised=promised if _launched(kernel, unit) else 0,
            )
        )
    return rows


def _dynamic_shared(kernel: str, scalar: str) -> int:
    """What Python asks for: at ESM-1b's vocabulary; at the most columns that a kernel of attention takes."""
    if kernel.startswith(_BY_TILES):
        return shared_bytes(*_attention(kernel, scalar))
    return 64 * 33 * 4 if kernel.startswith("cross_entropy") else 0


def _attention(kernel: str, scalar: str):
    """(dtype, columns, tiles of its own) of a kernel of attention or contacts."""
    dtype = {name: dtype for dtype, name in SCALARS.items()}[scalar]
    return dtype, int(kernel.rpartition("_")[2]), 1 if kernel.startswith(_OF_ONE_TILE) else 2


def _launched(kernel: str, unit) -> bool:
    arch = divmod(unit.arch, 10)
    return not kernel.startswith(_BY_TILES) or fits(arch, *_attention(kernel, unit.scalar))


def blocks_per_sm(registers: int, shared: int, threads: int, limits: Architecture) -> int:
    """Occupancy by CUDA's rules: registers are handed out 256 at a time to a warp, shared memory per block."""
    warps = -(-threads // 32)
    by_shared = limits.sm_shared // max(1, shared + limits.reserved_shared)
    by_registers = SM_REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, by_shared, limits.sm_threads // (32 * warps), limits.sm_blocks)


def disassemble(cubin: bytes) -> tuple[dict[str, dict[str, int]], dict[str, list[str]]]:
    """(resource usage, instructions with their modifiers), by kernel."""
    usage = {
        name: {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", numbers)}
        for name, numbers in re.findall(r"Function (\w+):\n(.*)", _read(cubin, "-res-usage"))
    }
    pattern = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)
    return usage, {name: pattern.findall(code) for name, code in listing(cubin).items()}


def listing(cubin: bytes) -> dict[str, str]:
    """Each kernel's machine code, with addresses."""
    bodies = re.split(r"Function : (\w+)", _read(cubin, "-sass"))[1:]
    return dict(zip(bodies[::2], bodies[1::2], strict=True))


def _read(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("cuobjdump", what, file.name)


def tools() -> Path | None:
    """NVIDIA's cuobjdump and nvdisasm: those of ESM_FAST_CUDA_TOOLS, else Triton's, which no longer read sm_70."""
    if "ESM_FAST_CUDA_TOOLS" in os.environ:
        return Path(os.environ["ESM_FAST_CUDA_TOOLS"])
    triton = importlib.util.find_spec("triton")
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else None


def _tool(name: str, *arguments: str) -> str:
    path = f"{tools()}{os.pathsep}{os.environ['PATH']}"  # one calls the other
    done = subprocess.run(
        [tools() / name, *arguments], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    return done.stdout


def read_table() -> list[Facts]:
    text = {"key", "kernel", "scalar"}
    with open(TABLE, newline="") as file:
        rows = [{n: v if n in text else int(v) for n, v in row.items()} for row in csv.DictReader(file)]
    return [Facts(**row) for row in rows]


def main() -> int:
    """Compiles what the table lacks, drops what no longer ships, prints problems."""
    known: dict[str, list[Facts]] = {}
    for facts in read_table() if TABLE.exists() else []:
        known.setdefault(facts.key, []).append(facts)
    units = build.units()
    new = [unit for unit in units if key_of(unit) not in known]
    compiler = build.Nvrtc()
    with ThreadPoolExecutor(2) as pool:
        for done, rows in enumerate(pool.map(lambda unit: audit(unit, compiler), new), start=1):
            known[rows[0].key] = rows
            print(f"\r{done} of {len(new)} compiled", end="", file=sys.stderr)
    rows = [(facts, uses_wmma(unit.source)) for unit in units for facts in known[key_of(unit)]]
    with open(TABLE, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Facts._fields, *(facts for facts, _ in rows)])
    bad = [f"{f.kernel} {f.scalar} sm_{f.arch}: {problem}" for f, wmma in rows for problem in f.problems(wmma)]
    print(f"{len(units)} compilations, {len(new)} of them new, {len(bad)} problems", *bad, sep="\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
