"""The CUDA kernels in csrc/cuda/, executed on the CPU by tests/cuda_emulator, under the rule of ops/verify.py.

What they compute is compared with PyTorch in fp64; see docs/cuda.md for what this proves and what it does not.
"""

import platform
import shutil

import pytest
import torch
import torch.nn.functional as F
from cuda_emulator.emulator import Emulator, cached, shipped
from esm_fast.kernels.cuda.common import executed_by
from esm_fast.kernels.cuda.launch import SCALARS
from esm_fast.kernels.cuda.layer_norm import layer_norm

from esm_fast.ops.verify import compare

if platform.machine() != "x86_64" or not shutil.which("g++"):
    pytest.skip("the emulator needs g++ on x86-64", allow_module_level=True)

DTYPES = list(SCALARS)


@pytest.fixture(scope="module")
def library():
    return cached(shipped())


@pytest.fixture(autouse=True)
def emulator(library):
    """Fresh memory is NaN, so that an element that no thread writes is seen."""
    torch.use_deterministic_algorithms(True)
    with executed_by(Emulator(library)) as emulator:
        yield emulator
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(1, 32), (5, 37), (33, 64), (4, 1280), (3, 1540)])
def test_layer_norm(dtype, rows, width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator) * 3 + 1
    gain, bias = torch.randn(2, width, generator=generator).to(dtype)

    def reference(wide):
        return F.layer_norm(x.to(wide), (width,), gain.to(wide), bias.to(wide))

    y, _ = layer_norm(x, gain, bias, 1e-5)
    assert y.dtype == dtype
    plain, truth = reference(torch.float32).to(dtype), reference(torch.float64)
    assert all(check.ok for check in compare(["y"], [y], [plain], [truth], dtype, 2.0))
