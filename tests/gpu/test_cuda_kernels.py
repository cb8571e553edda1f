"""The CUDA kernels in csrc/cuda/, executed on the CPU by tests/proof/cuda_emulator, under the rule of ops/verify.py.

The Python side is the one that ships: only what executes its launches is another. docs/kernels/cuda.md says what this
proves.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from esm_fast.kernels.cuda.launch import SCALARS
from esm_fast.kernels.cuda.layer_norm import layer_norm, layer_norm_grads

from esm_fast.ops import OPS, verify
from esm_fast.ops.registry import kernels

DTYPES = list(SCALARS)
KERNELS = [kernel for op in OPS for kernel in kernels(op) if kernel.backend == "cuda"]
CASES = [
    pytest.param(kernel, case, id=f"{kernel.op}-{case.name}") for kernel in KERNELS for case in OPS[kernel.op].cases()
]


pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("dtype", DTYPES, ids=SCALARS.get)
@pytest.mark.parametrize("kernel, case", CASES)
def test_every_case(kernel, case, dtype):
    op = OPS[kernel.op]
    for check in verify.forward(op, kernel, case, dtype, "cpu") + verify.gradients(op, kernel, case, dtype, "cpu"):
        assert check.ok, check


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.op)
def test_tensors_may_begin_anywhere(kernel):
    """A view into a flat buffer has the same bits as a tensor by itself; the emulator refuses a load that is not
    aligned."""
    op = OPS[kernel.op]
    case = next(case for case in op.cases() if case.name in ("tiny", "rows_33", "ragged", "masked_rows"))
    arguments = verify.bound(op, case.build(torch.float16, "cpu", 0))
    moved = {name: _one_further(value) for name, value in arguments.items()}
    found = [
        [*verify.outputs_of(kernel.forward(*of.values())), *verify.projected(partial(op, backend="cuda"), of, 0)]
        for of in (arguments, moved)
    ]
    assert all(map(torch.equal, *found))


def _one_further(value):
    if not isinstance(value, torch.Tensor):
        return value
    flat = value.new_empty(value.numel() + 1)
    assert flat[1:].data_ptr() % 16
    return flat[1:].view(value.shape).copy_(value)


@pytest.mark.parametrize("dtype", DTYPES, ids=SCALARS.get)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("rows, width", [(1, 32), (5, 37), (300, 64), (4, 1280), (3, 1540)])
def test_layer_norm(dtype, narrow, rows, width):
    """Widths beyond what a warp holds in registers, and more rows than the backward pass has blocks."""
    generator = torch.Generator().manual_seed(0)
    x, along = torch.randn(2, rows, width, generator=generator) * 3 + 1
    gain, bias = torch.randn(2, width, generator=generator).to(dtype)
    dy = torch.randn(rows, width, generator=generator).to(dtype)
    x = x.to(dtype) if narrow else x

    def reference(wide):
        leaves = [tensor.to(wide).requires_grad_() for tensor in (x, gain, bias)]
        y = F.layer_norm(leaves[0], (width,), *leaves[1:])
        grads = torch.autograd.grad(y, leaves, dy.to(wide))
        return [y.detach(), grads[0] + along.to(wide), *grads[1:]]

    y, statistics = layer_norm(x, gain, bias, 1e-5, keep_statistics=True)
    got = [y, *layer_norm_grads(x, gain, dy, statistics, along)]
    plain = [p.to(g.dtype) for p, g in zip(reference(torch.float32), got, strict=True)]
    for check in verify.compare(["y", "dx", "dgain", "dbias"], got, plain, reference(torch.float64), dtype, 2.0):
        assert check.ok, check
