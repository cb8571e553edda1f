"""Compiling the Triton kernels beforehand: for a GPU that is elsewhere, exactly what the model will launch there."""

import pytest
import torch

from esm_fast import ops, warmup
from esm_fast.cli import main
from esm_fast.models.esm1 import CONFIGS, Config
from esm_fast.ops import BackendError

triton = pytest.importorskip("triton", reason="triton is not installed")

from esm_fast.kernels.triton import common, compile_specs  # noqa: E402
from esm_fast.kernels.triton.elsewhere import compiling_for  # noqa: E402
from esm_fast.kernels.triton.pool import pool_rows  # noqa: E402

ESM1B = CONFIGS["esm1b_t33_650M_UR50S"]


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


@pytest.fixture
def launched(monkeypatch):
    """(kernel, constants) of everything that would be compiled; nothing is."""
    seen = set()

    def note(*, fn, compile, **_):
        names = fn.jit_function.arg_names
        constants = {names[place[0]]: str(value) for place, value in compile["constants"].items()}
        seen.add((fn.name.rpartition(".")[2], tuple(sorted(constants.items()))))
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kernel_that_ships_is_warmed(dtype, launched):
    with compiling_for(80):
        for train in (False, True):
            for _, step in warmup.steps(ESM1B, dtype=dtype, device="cpu", backend="triton", train=train):
                step()
    shipped = {spec.kernel_name for spec in compile_specs(80)}
    assert shipped - {name for name, _ in launched} == {"rotary"}  # which ESM-1b does not have
    blocks = {dict(fixed)["BLOCK"] for name, fixed in launched if name == "masked_softmax_forward"}
    assert blocks == {"16", "32", "64", "128", "256", "512", "1024"}


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
