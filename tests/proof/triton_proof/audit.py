"""Compiles the kernels for architectures that are not here and reads the facts off the machine code.

A compilation is identified by a key: the hash of Triton's IR without source locations, the options and Triton's
version. So the table of facts that is committed (kernels/triton/audit.csv) is known to belong to the kernels as they
are: whoever changes one sees its key change, and `make proof` compiles what is new.
"""

import contextlib
import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 does, without its warning

import triton
from esm_fast.kernels.triton import compile_specs
from esm_fast.kernels.triton.common import ARCHITECTURES, Spec
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

TABLE = Path(__file__).parents[3] / "kernels" / "triton" / "audit.csv"
TRITON_VERSION = "3.9.0"  # the table's: another one generates other code
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Architecture(NamedTuple):
    """Limits of CUDA's programming guide, and the generation's tensor-core instruction as a regular expression.

    Products in tf32, which are off unless asked for, may use HMMA everywhere, as their small tiles do.
    """

    block_shared: int
    sm_shared: int
    sm_threads: int
    sm_blocks: int
    tensor_core: str


LIMITS = {
    80: Architecture(163 << 10, 164 << 10, 2048, 32, "HMMA"),
    86: Architecture(99 << 10, 100 << 10, 1536, 16, "HMMA"),
    89: Architecture(99 << 10, 100 << 10, 1536, 24, "HMMA"),
    90: Architecture(227 << 10, 228 << 10, 2048, 32, "HGMMA"),
    100: Architecture(227 << 10, 228 << 10, 2048, 32, "UTC[A-Z]*MMA"),
    120: Architecture(99 << 10, 100 << 10, 1536, 24, "HMMA"),
}
SM_REGISTERS, RESERVED_SHARED = 65536, 1024  # the driver takes 1 KiB of shared memory a block


# Kernels that multiply matrices on tensor cores in half precision, and the fewest blocks an SM must hold of attention,
# so that one computes while the other waits for memory.
PRODUCTS = {
    *("attention_forward", "attention_backward", "contact_lse", "contact_sums", "contact_tiles", "contact_backward_q"),
    *("contact_backward_k", "gelu_ffn_backward", "input_grad", "linear", "lm_dense", "lm_project", "qkv_projection"),
}
ATTENTION_BLOCKS = 2


class Facts(NamedTuple):
    """What one compilation gave. spilled: bytes, by ptxas and by the local memory and its accesses in the cubin;
    tensor_core: instructions of the generation; blocks: how many fit on one SM."""

    key: str
    kernel: str
    direction: str
    dtype: str
    arch: int
    constexprs: str
    warps: int
    gemm: int
    registers: int
    shared: int
    spilled: int
    tensor_core: int
    blocks: int

    def problems(self) -> list[str]:
        limits = LIMITS[self.arch]
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes of registers")
        if self.shared > limits.block_shared:
            found.append(f"needs {self.shared} bytes of shared memory, a block has {limits.block_shared}")
        multiplies = self.gemm or (self.kernel in PRODUCTS and self.dtype != "fp32")
        if multiplies and not self.tensor_core:
            found.append(f"has no tensor-core instruction {limits.tensor_core}")
        if not self.blocks:
            found.append("does not fit on an SM")
        elif self.kernel in ("attention_forward", "attention_backward") and self.dtype != "fp32":
            head_dim = int(re.search(r"HEAD_DIM=(\d+)", self.constexprs)[1])
            if head_dim <= 64 and self.blocks < ATTENTION_BLOCKS:
                found.append(f"leaves room for {self.blocks} block on an SM, not for {ATTENTION_BLOCKS}")
        return found

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} sm_{self.arch} {self.constexprs}"


_known_ir: dict[tuple, str] = {}


def key_of(spec: Spec, capability: int) -> str:
    """The identity of a compilation; takes milliseconds, as nothing is lowered. The IR is one for all architectures."""
    described = (id(spec.jit_fn), *spec.signature.values(), *spec.constexprs.items(), *_options(spec).values())
    if described not in _known_ir:
        _known_ir[described] = ir_of(spec, capability)
    text = f"{triton.__version__} {capability} {_options(spec)} {_known_ir[described]}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def ir_of(spec: Spec, capability: int) -> str:
    """What Triton makes of a kernel before it is lowered."""
    with made(spec, capability) as (module, _):
        return module.str_nodebug()


@contextlib.contextmanager
def made(spec: Spec, capability: int):
    """Triton's module of a kernel, before it is lowered, and the stages that lower it; gone with their context."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    options = backend.parse_options(_options(spec))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source, stages = _source(spec), {}
    generated = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, *generated, context)
    backend.add_stages(stages, options, source.language)
    yield module, stages


def audit(spec: Spec, capability: int, **extra_options) -> Facts:
    """Compiles and reads. ptxas's own report counts as well as what the disassembled code does."""
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as fresh, contextlib.redirect_stdout(log), triton.knobs.cache.scope():
        triton.knobs.cache.dir = fresh  # a cached kernel would come without ptxas's report
        with triton.knobs.nvidia.scope():
            triton.knobs.nvidia.dump_ptxas_log = True
            compiled = triton.compile(
                _source(spec), GPUTarget("cuda", capability, 32), {**_options(spec), **extra_options}
            )
    spills = [int(size) for size in re.findall(r"(\d+) bytes spill", log.getvalue())]
    if not spills:
        raise RuntimeError(f"ptxas said nothing of spills: {log.getvalue()!r}")
    usage, instructions = disassemble(compiled.asm["cubin"])
    local = instructions.count("STL") + instructions.count("LDL") + usage["STACK"] + usage["LOCAL"]
    limits = LIMITS[capability]
    shared = max(compiled.metadata.shared, usage["SHARED"])
    wanted = limits.tensor_core + ("|HMMA" if spec.dtype == "fp32" else "")
    return Facts(
        key=key_of(spec, capability),
        kernel=spec.kernel_name,
        direction=spec.direction,
        dtype=spec.dtype,
        arch=capability,
        constexprs=" ".join(f"{name}={value}" for name, value in spec.constexprs.items()),
        warps=spec.num_warps,
        gemm=int(spec.gemm),
        registers=usage["REG"],
        shared=shared,
        spilled=sum(spills) + local,
        tensor_core=sum(bool(re.fullmatch(wanted, name)) for name in instructions),
        # Warp specialisation has more warps than were asked for.
        blocks=blocks_per_sm(usage["REG"], shared, compiled.metadata.num_warps, limits),
    )


def blocks_per_sm(registers: int, shared: int, warps: int, limits: Architecture) -> int:
    """Occupancy by CUDA's rules: registers are handed out 256 at a time to a warp, shared memory per block."""
    warp_registers = -(-registers * 32 // 256) * 256
    return min(
        SM_REGISTERS // (warp_registers * warps),
        limits.sm_shared // (shared + RESERVED_SHARED),
        limits.sm_threads // (32 * warps),
        limits.sm_blocks,
    )


def disassemble(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """(resource usage, names of all instructions without their modifiers) of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_tool(*command, file.name) for command in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return numbers, re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code, re.MULTILINE)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _options(spec: Spec) -> dict:
    return dict(num_warps=spec.num_warps, num_stages=spec.num_stages)


def _source(spec: Spec) -> ASTSource:
    pointers = [i for i, kind in enumerate(spec.signature.values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    return ASTSource(spec.jit_fn, spec.signature, spec.constexprs, aligned)


def compilations() -> list[tuple[Spec, int]]:
    """(spec, architecture) for ESM-1b's head size and the default precision: what the table holds."""
    return [(spec, arch) for arch in ARCHITECTURES for spec in compile_specs(arch) if _in_table(spec)]


def _in_table(spec: Spec) -> bool:
    return spec.constexprs.get("HEAD_DIM", 64) == 64 and spec.constexprs.get("PRECISION") != "tf32"


def read_table() -> dict[str, Facts]:
    """The committed facts by key."""
    if not TABLE.exists():
        return {}
    numbers = {"arch", "warps", "gemm", "registers", "shared", "spilled", "tensor_core", "blocks"}
    with open(TABLE, newline="") as file:
        rows = [{n: int(v) if n in numbers else v for n, v in row.items()} for row in csv.DictReader(file)]
    return {row["key"]: Facts(**row) for row in rows}


def main() -> int:
    """Compiles what the table lacks, drops what no longer ships, prints problems. With --all, only prints the problems
    of other head sizes and of tf32."""
    if triton.__version__ != TRITON_VERSION:
        sys.exit(f"the table is made with Triton {TRITON_VERSION}, this is {triton.__version__}")
    if sys.argv[1:] == ["--all"]:
        return _audit_the_rest()
    known, wanted = read_table(), [key_of(*compilation) for compilation in compilations()]
    new = [number for number, key in enumerate(wanted) if key not in known]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            for done, facts in enumerate(pool.map(audit_number, new), start=1):
                known[facts.key] = facts
                print(f"\r{done} of {len(new)} compiled", end="", file=sys.stderr)
        finally:  # an interrupted run resumes where it stopped
            pool.shutdown(wait=False, cancel_futures=True)
            rows = sorted((known[key] for key in wanted if key in known), key=lambda facts: facts[1:])
            _write(rows)
    bad = [f"{facts} {problem}" for facts in rows for problem in facts.problems()]
    print(f"{len(rows)} compilations, {len(new)} of them new, {len(bad)} problems", *bad, sep="\n")
    return bool(bad)


def _audit_the_rest() -> int:
    bad = 0
    rest = [(spec, arch) for arch in ARCHITECTURES for spec in compile_specs(arch) if not _in_table(spec)]
    for spec, capability in rest:
        facts = audit(spec, capability)
        bad += len(facts.problems())
        print(facts, *(facts.problems() or ["fine"]), flush=True)
    return bool(bad)


def _write(rows: list[Facts]) -> None:
    with open(TABLE, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Facts._fields, *rows])


def audit_number(number: int) -> Facts:
    """In a process of its own: specs hold functions, which do not travel, so that only their number does."""
    return audit(*compilations()[number])


if __name__ == "__main__":
    sys.exit(main())
