"""The CUDA kernels as machine code: what the audit's table says of them, and how they are packaged and loaded."""

import importlib.util
import zipfile

import pytest
import torch
from building import ROOT
from cuda_proof import audit, loops
from esm_fast.kernels.cuda import driver

from esm_fast.ops.registry import BackendError, Request, select

build = audit.build


def test_the_table_is_of_these_kernels():
    """Every kernel, dtype and architecture, without a spill and as many on an SM as the source promises."""
    wanted = {(audit.key_of(unit), name) for unit in build.units() for name in audit.declarations(unit.source)}
    table = audit.read_table()
    assert {(facts.key, facts.kernel) for facts in table} == wanted, "run python tests/proof/cuda_proof/audit.py"
    wmma = {
        name for source in build.SOURCES.glob("*.cu") if audit.uses_wmma(source) for name in audit.declarations(source)
    }
    assert [(facts, problem) for facts in table for problem in facts.problems(facts.kernel in wmma)] == []
    assert {facts.arch for facts in table} == {70, 75, 80, 86, 89, 90, 100, 120}


def test_the_key_changes_with_source_headers_and_target(tmp_path):
    unit = next(unit for unit in build.units() if unit.source.stem == "pool")
    for path in build.SOURCES.glob("*.cu*"):
        (tmp_path / path.name).write_text(path.read_text())
    copy = unit._replace(source=tmp_path / unit.source.name)
    assert audit.key_of(copy) == audit.key_of(unit)
    keys = {audit.key_of(copy), audit.key_of(copy._replace(arch=90)), audit.key_of(copy._replace(scalar="f16"))}
    header = tmp_path / "rows.cuh"
    header.write_text(header.read_text() + "\n// a comment\n")
    assert audit.key_of(copy) == audit.key_of(unit)
    header.write_text(header.read_text().replace("kRowsPerBlock = 4", "kRowsPerBlock = 8"))
    assert len(keys | {audit.key_of(copy)}) == 4


def test_problems_are_named():
    facts = next(facts for facts in audit.read_table() if facts.kernel == "pool_forward" and facts.scalar == "f16")
    assert facts.problems() == []
    assert "spills 8" in facts._replace(spilled=8).problems()
    assert "3 blocks fit on an SM, 4 are promised" in facts._replace(blocks=3).problems()
    assert "has no tensor-core instruction" in facts.problems(uses_wmma=True)


def test_tensor_cores_share_of_the_inner_loop():
    """On sm_70, of attention in fp16: a tenth of the loop's instructions is the floor."""
    table = {loop.kernel: loop for loop in loops.read_table()}
    assert {loop.key for loop in table.values()} == {audit.key_of(loops.unit())}, (
        "run python -m cuda_proof.loops in tests/"
    )
    hmma = {f.kernel: f.hmma for f in audit.read_table() if f.key == audit.key_of(loops.unit())}
    assert {kernel: loop.hmma for kernel, loop in table.items()} == hmma
    assert all(loop.share > 0.10 for loop in table.values()), table


LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDS R2, [R1] ;
        /*0020*/                   FADD R3, R2, R2 ;
        /*0030*/              @P1  BRA 0x10 ;
        /*0040*/                   HMMA.884.F32.F32.STEP0 R4, R2, R3, R4 ;
        /*0050*/              @!P0 BRA 0x10 ;
        /*0060*/               @P2 BRA 0x0 ;
        /*0070*/                   EXIT ;
"""


def test_an_inner_loop_is_found():
    """The smallest around the tensor cores; no loop where they stand outside, and one that is diluted has less."""
    assert loops.inner_loop(LOOP) == (5, 1)
    assert loops.inner_loop(LOOP.replace("BRA 0x10 ;\n        /*0060*/               @P2 BRA 0x0", "NOP ;")) == (0, 0)
    assert loops.inner_loop(LOOP.replace("HMMA.884", "FFMA")) == (0, 0)
    diluted = LOOP.replace("        /*0050*/", "        /*0048*/   FADD R3, R2, R2 ;\n" * 20 + "        /*0050*/")
    assert loops.inner_loop(diluted) == (25, 1) and not loops.Loop("", "", 25, 1).share > 0.10


@pytest.mark.parametrize(
    "registers, shared, threads, arch, blocks",
    [
        (128, 24576, 128, 80, 4),
        (168, 24576, 128, 86, 3),
        (64, 49152, 128, 70, 2),
        (32, 0, 256, 75, 4),
        (255, 0, 128, 70, 2),
    ],
)
def test_occupancy_is_cudas(registers, shared, threads, arch, blocks):
    """By hand from the rules of CUDA's programming guide."""
    assert audit.blocks_per_sm(registers, shared, threads, audit.LIMITS[arch]) == blocks


# --- compiling -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nvrtc():
    try:
        return build.Nvrtc()
    except build.CompileError as problem:
        pytest.skip(str(problem))


def test_a_sample_compiles_as_the_table_says(nvrtc):
    """Every file but attention's, which is slow to compile; another dtype and architecture in turn. sm_70 is left to
    who has tools that read it."""
    if audit.tools() is None:
        pytest.skip("needs Triton, for NVIDIA's disassembler")
    units = [unit for unit in build.units() if unit.arch > 70]
    sources = sorted({unit.source for unit in units})
    table = {(facts.key, facts.kernel): facts for facts in audit.read_table()}
    for i, source in enumerate(sources):
        if source.stem == "attention":
            continue
        of_source = [unit for unit in units if unit.source == source]
        for facts in audit.audit(of_source[7 * i % len(of_source)], nvrtc):
            assert facts == table[facts.key, facts.kernel]


SPILLING = """
#include "common.cuh"
namespace esm {
KERNEL(1024, 2, spilling_forward, (Global<const float> x, Global<float> y, int n)) {
    float held[96];
#pragma unroll
    for (int i = 0; i < 96; ++i) held[i] = x[i * n + threadIdx.x];
    __syncthreads();
    for (int j = 0; j < n; ++j) {
        const float next = x[j];
#pragma unroll
        for (int i = 0; i < 96; ++i) held[i] = held[i] * next + held[95 - i];
    }
#pragma unroll
    for (int i = 0; i < 96; ++i) y[i * n + threadIdx.x] = held[i];
}
}
"""


def test_a_spill_is_found(nvrtc, tmp_path):
    if audit.tools() is None:
        pytest.skip("needs Triton, for NVIDIA's disassembler")
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    (facts,) = audit.audit(build.Unit(source, "f32", 80), nvrtc)
    assert facts.spilled and "spills" in facts.problems()[0]


def test_a_kernel_that_does_not_compile_is_named(nvrtc, tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text('#include "common.cuh"\nint x = nothing;\n')
    with pytest.raises(build.CompileError, match=r'(?s)broken.f16.sm_70.cubin.*"nothing" is undefined'):
        nvrtc.compile(build.Unit(source, "f16", 70))
    assert nvrtc.compile(build.Unit(build.SOURCES / "pool.cu", "f16", 90, True)).startswith(b"//")


def test_the_choice_of_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.compiler_of("off") is None
    with pytest.raises(build.CompileError, match="nvcc is not on PATH"):
        build.compiler_of("nvcc")
    with pytest.raises(build.CompileError, match="choose from auto, nvcc, nvrtc and off"):
        build.compiler_of("on")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert build.compiler_of("auto") is None
    assert "NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12" in capsys.readouterr().err


def test_one_architecture_is_built_by_itself(tmp_path):
    """Without NVRTC: the compiler is a toy, whose images are their names."""

    class Toy:
        architectures = (80, 90)

        def compile(self, unit):
            return unit.file_name.encode()

    build.build(tmp_path / "one.zip", Toy(), "90")
    names = zipfile.ZipFile(tmp_path / "one.zip").namelist()
    assert names and all(name.endswith(".sm_90.cubin") for name in names)
    with pytest.raises(build.CompileError, match="'7.0': 70 is none of 80, 90"):
        build.build(tmp_path / "none.zip", Toy(), "7.0")


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_it_says_so():
    count, why = driver.devices()
    assert count == 0 and why.startswith("0 CUDA devices: ")
    request = Request("cuda", (7, 0), torch.float16, None, False)
    with pytest.raises(BackendError, match="0 CUDA devices"):
        select("pool", request, "cuda")


@pytest.mark.parametrize(
    "arch, name",
    [
        ((7, 0), "pool.f32.sm_70.cubin"),
        ((7, 2), "pool.f32.sm_70.cubin"),
        ((8, 7), "pool.f32.sm_86.cubin"),
        ((10, 3), "pool.f32.sm_100.cubin"),
        ((12, 1), "pool.f32.sm_120.cubin"),
        ((13, 0), "pool.f32.compute_90.ptx"),
    ],
)
def test_which_image_a_gpu_gets(arch, name, monkeypatch, tmp_path):
    """Code for a GPU runs on newer ones of its generation; PTX is for those that nothing was compiled for."""
    archive = tmp_path / "cubins.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for unit in [*build.units(), *build.ptx_units()]:
            file.writestr(unit.file_name, b"")
    monkeypatch.setattr(driver, "CUBINS", archive)
    driver.built.cache_clear()
    try:
        assert driver.image_name("pool", "f32", arch) == name
        with pytest.raises(driver.DriverError, match="not compiled for compute capability 6.1"):
            driver.image_name("pool", "f32", (6, 1))
    finally:
        driver.built.cache_clear()


def test_the_package_lists_the_backend():
    assert '"esm_fast.kernels.cuda"' in (ROOT / "setup.py").read_text()
