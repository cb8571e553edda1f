"""Faults planted in the shipped kernels, each caught by the check that is there for it."""

import pytest
import torch
from triton_proof import checks, mutants, source

from esm_fast.ops import OPS, registry, verify


def examine(op_name: str, case_name: str, direction: str) -> None:
    """What interpreted_ops.py asks of every kernel, of one case in fp32."""
    op = OPS[op_name]
    kernel = next(kernel for kernel in registry.kernels(op_name) if kernel.backend == "triton")
    case = next(case for case in op.cases() if case.name == case_name)
    rule = {"fwd": verify.forward, "bwd": verify.gradients}[direction]
    found = rule(op, kernel, verify.guarded(case), torch.float32, "cpu")
    if wrong := [check for check in found if not check.ok]:
        raise AssertionError(f"beyond tolerance: {wrong}")
    if case_name == "tile_edges":
        share_of = checks.SHARES[op_name]
        checks.neighbours_are_left_alone(op, kernel, case, torch.float32, share_of, grad=direction == "bwd")


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: f"{mutant.module}-{mutant.fault}")
def test_a_fault_in_a_shipped_kernel_is_caught(mutant, tmp_path):
    exception, match = mutant.caught
    with mutants.planted(mutant, tmp_path), pytest.raises(exception, match=f"(?s){match}"):
        examine(mutant.op, mutant.case, mutant.direction)


def test_planting_nothing_changes_nothing(tmp_path):
    mutant = mutants.MUTANTS[0]
    with mutants.planted(mutant._replace(wrong=mutant.right), tmp_path):
        examine(mutant.op, mutant.case, mutant.direction)


def test_every_file_of_kernels_has_a_mutant():
    kernels = {path.stem for path in source.KERNELS.glob("*.py") if "@triton.jit" in path.read_text()}
    assert {mutant.module for mutant in mutants.MUTANTS} == kernels
