"""The emulator that runs the CUDA kernels: what it computes, and that it finds every fault planted in toys.cu."""

import platform
import shutil

import pytest
import torch
from cuda_emulator import emulator
from cuda_emulator.emulator import BOUNDS, HERE, RACES, Emulator, EmulatorError, figures, recorded, replay
from esm_fast.kernels.cuda.launch import Launch

if platform.machine() != "x86_64" or not shutil.which("g++"):
    pytest.skip("the emulator needs g++ on x86-64", allow_module_level=True)

TOYS = [emulator.Unit(HERE / "toys.cu", "f32")]


@pytest.fixture(scope="module")
def library():
    return emulator.loadable(TOYS)


@pytest.fixture(scope="module")
def programs():
    return {flags: emulator.program(TOYS, flags) for flags in (BOUNDS, RACES)}


def launch(name, *arguments, grid=2, block=64, shared=0):
    return Launch("toys", f"toys_{name}", torch.float32, (grid,), block, arguments, shared)


def reverse(fault, n=128):
    x, y = torch.arange(float(n)), torch.full((n,), torch.nan)
    return launch("reverse", x, y, fault, grid=n // 64), y


def product(fault):
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    c = torch.full((16, 16), torch.nan)
    return launch("product", a, b, c, fault, grid=1, block=32), c, a.float() @ b.float().T


@pytest.mark.parametrize("seed", range(4))
def test_what_it_computes(library, seed):
    runner = Emulator(library, seed)
    described, y = reverse(0)
    runner.launch(described)
    assert torch.equal(y, torch.arange(128.0).view(2, 64).flip(1).flatten())

    x, y = torch.randn(128), torch.empty(128)
    runner.launch(launch("sum", x, y, 0))
    torch.testing.assert_close(y.view(4, 32), x.view(4, 32).sum(1, keepdim=True).expand(4, 32))

    counts, order = torch.tensor([0, 1000], dtype=torch.int32), torch.empty(128, dtype=torch.int32)
    runner.launch(launch("positive", x, counts, order, 0))
    positive = x > 0
    assert counts.tolist() == [int(positive.sum()), int(positive.nonzero()[0])]
    ranks = positive.view(4, 32).int().cumsum(1) - 1
    assert torch.equal(order.view(4, 32), ranks.masked_fill(~positive.view(4, 32), -1).int())

    described, c, expected = product(0)
    runner.launch(described)
    torch.testing.assert_close(c, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "described, message",
    [
        (reverse(1)[0], r"thread \(5|1 of 64 threads have returned"),
        (reverse(2)[0], "an access of bytes 512 to 516 of a tensor of 512"),
        (reverse(4)[0], "at __syncthreads of line"),
        (reverse(6)[0], "which another block reads or writes"),
        (reverse(7)[0], "which another block"),
        (launch("sum", torch.ones(128), torch.ones(128), 1), "which has returned"),
        (launch("sum", torch.ones(128), torch.ones(128), 2), "takes no part in it|takes part in another operation"),
        (launch("positive", torch.ones(128), torch.zeros(2).int(), torch.zeros(128).int(), 1), "another block"),
        (product(2)[0], "stride must be a multiple of 16 bytes, not 24"),
        (launch("copy", torch.ones(520), torch.ones(512), 1), "not aligned to 16"),
        (launch("sum", torch.ones(128), torch.ones(128)), "takes FFi, not FF"),
        (launch("sum", torch.ones(128), torch.ones(128).half(), 0), "takes FFi, not FHi"),
        (launch("sum", torch.ones(128), None, 0), "a null pointer is used"),
        (launch("sum", torch.ones(128), torch.ones(128), 0, block=128), "bounded to 64 threads"),
        (launch("nothing"), "no kernel toys_nothing"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_faults_that_any_run_shows(library, described, message, seed):
    with pytest.raises(EmulatorError, match=message):
        Emulator(library, seed).launch(described)
    right, y = reverse(0)  # a launch that failed leaves nothing behind
    Emulator(library).launch(right)
    assert y[0] == 63


def test_faults_that_the_result_shows(library):
    described, y = reverse(3)
    Emulator(library).launch(described)
    assert y.isnan().nonzero().flatten().tolist() == [63 - 9, 64 + 63 - 9]  # shared memory is poisoned, in every block
    described, c, expected = product(1)
    Emulator(library).launch(described)
    assert (c - expected).abs().max() > 0.1


def test_faults_that_a_sanitizer_shows(programs, tmp_path):
    def report(described, flags, seed=0):
        path = tmp_path / "recording"
        path.write_bytes(recorded(described))
        return replay(programs[flags], path, seed)

    for flags in (BOUNDS, RACES):
        for right in (reverse(0)[0], product(0)[0]):
            done = report(right, flags, seed=3)
            assert (done.returncode, done.stdout, done.stderr) == (0, "1 launches\n", "")
    assert "heap-buffer-overflow" in report(reverse(8)[0], BOUNDS).stderr
    assert "data race" in report(reverse(5)[0], RACES).stderr
    assert "data race" in report(product(3)[0], RACES).stderr


def test_traffic(library):
    """Packs of 16 bytes in 2 full warps a block, and single floats."""
    runner = Emulator(library, traffic=True)
    runner.launch(launch("copy", torch.ones(512), torch.ones(512), 0))
    runner.launch(launch("sum", torch.ones(128), torch.ones(128), 0))
    found = [list(part.values()) for _, result in runner.counted for part in figures(result)]
    assert found == [[4, 64, 2048, 0, 2048]] * 2 + [[4, 16, 512, 512, 512]] * 2
