"""Compiling the Triton kernels beforehand: for a GPU that is elsewhere, exactly what the model will launch there."""

from typing import NamedTuple

import pytest
import torch

from esm_fast import ops
from esm_fast.cli import main
from esm_fast.inference import warmup
from esm_fast.models.esm1 import CONFIGS, Config
from esm_fast.ops import BackendError

triton = pytest.importorskip("triton", reason="triton is not installed")

from esm_fast.kernels.triton import common, compile_specs  # noqa: E402
from esm_fast.kernels.triton.elsewhere import compiling_for  # noqa: E402
from esm_fast.kernels.triton.pool import pool_rows  # noqa: E402

ESM1B, ESM1V = CONFIGS["esm1b_t33_650M_UR50S"], CONFIGS["esm1v_t33_650M_UR90S_1"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of Triton's."""
    if common.interpreted():
        pytest.skip("Triton's interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "triton"


def pool():
    x = torch.ones(8, 64)
    return ops.pool(x, torch.tensor([0, 3, 8], dtype=torch.int32), x[:, 0].contiguous(), backend="triton")


@pytest.mark.parametrize("arch", [80, 90])
def test_a_launch_on_the_cpu_fills_the_cache_for_an_architecture(arch, cache):
    with compiling_for(arch):
        pool()
    (code,) = cache.glob("*/pool_rows.ptx")
    assert f".target sm_{arch}" in code.read_text() and list(cache.glob("*/pool_rows.cubin"))


def test_afterwards_a_cpu_is_refused_again():
    with pytest.raises(BackendError, match="needs a CUDA device"):
        pool()
    with compiling_for(86):
        pool()
    with pytest.raises(BackendError, match="needs a CUDA device"):
        pool()


class Compilation(NamedTuple):
    """What makes one compilation of a kernel another than the next."""

    kernel: str
    types: tuple[str, ...]
    constants: tuple[tuple[str, str], ...]
    aligned: frozenset[str]
    warps: int
    stages: int


def audited(arch: int) -> set[Compilation]:
    """What the audit compiles. Its table holds these and no other: test_gpu_tables.py."""
    return {
        Compilation(
            spec.kernel_name,
            tuple(spec.signature.values()),
            tuple(sorted((name, str(value)) for name, value in spec.constexprs.items())),
            frozenset(name for name, kind in spec.signature.items() if kind.startswith("*")),
            spec.num_warps,
            spec.num_stages,
        )
        for spec in compile_specs(arch)
    }


@pytest.fixture
def launched(monkeypatch):
    """Everything that would be compiled; nothing is."""
    seen = set()

    def note(*, fn, compile, **_):
        names = fn.jit_function.arg_names
        constants = {names[place[0]]: str(value) for place, value in compile["constants"].items()}
        aligned = {names[place[0]] for place in compile["configs"][0]} - constants.keys()
        types = tuple(compile["signature"].values())
        kernel, options = fn.name.rpartition(".")[2], (compile["num_warps"], compile["num_stages"])
        seen.add(Compilation(kernel, types, tuple(sorted(constants.items())), frozenset(aligned), *options))
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    return seen


def warm(config, arch, dtype):
    with compiling_for(arch):
        for train in (False, True):
            for _, step in warmup.steps(config, dtype=dtype, device="cpu", backend="triton", train=train):
                step()


@pytest.mark.parametrize(
    "config, arch, dtype",
    [(ESM1B, 80, torch.bfloat16), (ESM1V, 90, torch.float32), (ESM1B, 100, torch.float16)],
    ids=["esm1b-bf16", "esm1v-fp32", "esm1b-fp16"],
)
def test_every_kernel_that_ships_is_warmed_and_audited(config, arch, dtype, launched, monkeypatch):
    """As it is launched: its types, tiles and alignment."""
    if dtype == torch.float16:
        monkeypatch.setattr(warmup, "_SEQUENCES", (1,))  # torch's own products in fp16 are slow on a CPU
    warm(config, arch, dtype)
    shipped = {spec.kernel_name for spec in compile_specs(arch)}
    assert shipped - {launch.kernel for launch in launched} == {"rotary"}  # which these models do not have
    blocks = {dict(launch.constants)["BLOCK"] for launch in launched if launch.kernel == "masked_softmax_forward"}
    assert blocks == {"16", "32", "64", "128", "256", "512", "1024"}
    assert launched <= audited(arch), sorted(launched - audited(arch))


@pytest.mark.parametrize(
    "change",
    [dict(warps=2), dict(stages=9), dict(aligned=frozenset()), dict(types=("*fp64",)), dict(constants=())],
    ids=lambda change: next(iter(change)),
)
def test_another_compilation_is_not_audited(change):
    launch = next(launch for launch in audited(80) if launch.kernel == "layer_norm_forward")
    assert launch._replace(**change) not in audited(80)


def test_the_command_compiles_and_then_finds_it_in_the_cache(monkeypatch, capsys):
    def few(*_, **__):
        yield "pool", pool

    monkeypatch.setattr(warmup, "steps", few)
    command = ["warmup", "--backend", "triton", "--arch", "12.0", "--inference"]
    for counts in ("compiled 1 kernels for sm_120, 0 were", "compiled 0 kernels for sm_120, 1 were"):
        pool_rows.device_caches.clear()
        assert main(command) == 0
        assert counts in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, code, message",
    [
        ([], 0, "nothing needs warming on a CPU"),
        (["--arch", "8.0"], 0, "nothing to compile: cutlass and reference run there"),
        (["--arch", "7.0", "--backend", "triton"], 1, "needs compute capability 8.0, this GPU has 7.0"),
        (["--arch", "9.0", "--dtype", "int8"], 1, "int8 is for CPUs"),
        (["--arch", "9.0", "--model", "random:foo"], 1, "'random:foo' is no model"),
        (["--arch", "9.0", "--backend", "nope"], 1, "there is no backend 'nope'"),
        (["--device", "cuda:99"], 1, "device 'cuda:99' cannot be used"),
        (["--arch", "9.0", "--qualify"], 1, "leave --arch out"),
    ],
)
def test_the_command_says_when_there_is_nothing_to_do(options, code, message, capsys):
    if not options and torch.cuda.is_available():
        pytest.skip("there is a GPU to warm")
    assert main(["warmup", *options]) == code
    assert message in "".join(capsys.readouterr())


def test_the_steps_run_where_there_is_a_backend():
    config = Config(2, 32, 64, 4, max_positions=32)
    names = []
    for train in (False, True):
        for name, step in warmup.steps(config, dtype=torch.float32, device="cpu", backend="reference", train=train):
            step()
            names.append(name)
    assert len(names) == 3 * (len(warmup._INFERENCE) + len(warmup._TRAINING)) + 2 * 2
