"""Products by TMA descriptors in the interpreter: by the rule, in guarded memory, with the bits of the others."""

import pytest
import torch
from esm_fast.kernels import tma
from triton_proof import sanitizer

from esm_fast.ops import OPS, registry, verify
from esm_fast.ops.gelu_ffn import _case as ffn_case
from esm_fast.ops.pre_ln_attention import _case as layer_case

CASES = {
    "gelu_ffn": [ffn_case("tiles", 140, 72, 200), ffn_case("odd_hidden", 7, 32, 37), ffn_case("no_rows", 0, 32, 64)],
    "pre_ln_attention": [layer_case("rotary", [65, 0, 3], 3, 24, rotary=True)],
}


def kernel(op_name, backend):
    return next(kernel for kernel in registry.kernels(op_name) if kernel.backend == backend)


@pytest.mark.parametrize("op_name, case", [pytest.param(o, c, id=f"{o}-{c.name}") for o in CASES for c in CASES[o]])
def test_tma_is_right_and_sums_in_the_same_order_bfloat16(op_name, case):
    op, dtype = OPS[op_name], torch.bfloat16
    with sanitizer.recording() as launches:
        for check in verify.forward(op, kernel(op_name, "tma"), verify.guarded(case), dtype, "cpu"):
            assert check.ok, check
    taken = case.name not in ("no_rows", "odd_hidden")  # rows of 74 bytes
    assert taken == ("linear_tma" in {launch.kernel for launch in launches})
    values = verify.bound(op, case.build(dtype, "cpu", 0)).values()
    assert torch.equal(kernel(op_name, "tma").forward(*values), kernel(op_name, "triton").forward(*values))


def test_more_tiles_than_programs_are_walked_through_bfloat16(monkeypatch):
    op, case = OPS["gelu_ffn"], CASES["gelu_ffn"][0]
    monkeypatch.setattr(tma, "_INTERPRETED", 1)
    for check in verify.forward(op, kernel("gelu_ffn", "tma"), case, torch.bfloat16, "cpu"):
        assert check.ok, check
