"""Calls that between them launch every kernel that ships, with what they should return: for sanitizers and mutants."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from esm_fast.kernels.cuda.layer_norm import layer_norm, layer_norm_grads

from esm_fast.ops import OPS, verify
from esm_fast.ops.registry import kernels


class Exercise(NamedTuple):
    """run(dtype) launches kernels and returns whether what they computed is right."""

    name: str
    run: Callable[[torch.dtype], bool]


def exercises() -> list[Exercise]:
    ops = [kernel for op in OPS for kernel in kernels(op) if kernel.backend == "cuda"]
    by_op = [
        Exercise(f"{kernel.op}-{case.name}", lambda dtype, k=kernel, c=case: _verified(k, c, dtype))
        for kernel in ops
        for case in OPS[kernel.op].cases()
    ]
    return [*by_op, Exercise("layer_norm", _layer_norm)]


def _verified(kernel, case, dtype) -> bool:
    op = OPS[kernel.op]
    checks = verify.forward(op, kernel, case, dtype, "cpu") + verify.gradients(op, kernel, case, dtype, "cpu")
    return all(check.ok for check in checks)


def _layer_norm(dtype) -> bool:
    """More rows than the backward pass has blocks."""
    x, dy = torch.randn(2, 300, 64)
    gain, bias = torch.randn(2, 64).to(dtype)
    y, statistics = layer_norm(x, gain, bias, 1e-5, keep_statistics=True)
    dx, dgain, dbias = layer_norm_grads(x, gain, dy.to(dtype), statistics)
    return bool(torch.isfinite(dx).all()) and torch.allclose(dbias.float(), dy.sum(0), rtol=0.1, atol=0.5)
