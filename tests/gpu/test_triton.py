"""The Triton backend, proven without a GPU: its source, its machine code, and its results in Triton's interpreter.

The tools are in triton_proof/, and so are the tests that run in the interpreter, in pytest processes of their own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed; the test extra has it on Linux x86-64")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

from triton_proof import audit, matrix, source  # noqa: E402

# --- source ----------------------------------------------------------------------------------------------------------


def test_the_source_keeps_the_rules():
    files = sorted(source.KERNELS.glob("*.py"))
    assert files
    assert [problem for file in files for problem in source.problems(file.read_text(), file.name)] == []


@pytest.mark.parametrize(
    "line, match",
    [
        ("tl.load(x + i, mask=i < n)", "without `other`"),
        ("tl.load(x + i, i < n)", "without `other`"),
        ("tl.atomic_add(x, 1.0)", "no fixed order"),
        ("tl.dot(a, b)", "tf32"),
        ("n = lengths.max().item()", "waits"),
    ],
)
def test_a_broken_rule_is_found(line, match):
    (problem,) = source.problems(line)
    assert match in problem


@pytest.mark.parametrize(
    "line", ["tl.load(x)", "tl.load(x, m, 0.0)", "tl.load(x, mask=m, other=0.0)", "x.item()  # waits: for"]
)
def test_a_kept_rule_is_not(line):
    assert source.problems(line) == []


# --- machine code ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compilers():
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


def test_a_sample_compiles_without_problems(compilers):
    """One of every file of kernels, for all kinds of dtypes and architectures; and as the table has it."""
    by_file = {}
    for number, (spec, _) in enumerate(audit.compilations()):
        by_file.setdefault(spec.jit_fn.__module__, []).append(number)
    sample = [numbers[7 * i % len(numbers)] for i, numbers in enumerate(by_file.values())]
    table = audit.read_table()
    for facts in compilers.map(audit.audit_number, sample):
        assert facts.problems() == [], facts
        if triton.__version__ == audit.TRITON_VERSION:
            assert table.get(facts.key, facts) == facts


def one_of(kernel, dtype="bf16", **constexprs):
    """A spec of a kernel, by its name."""
    return next(
        spec
        for spec in audit.compile_specs(80)
        if spec.kernel_name == kernel and spec.dtype == dtype and constexprs.items() <= spec.constexprs.items()
    )


def test_a_spill_is_found():
    facts = audit.audit(one_of("attention_forward", HEAD_DIM=64), 80, maxnreg=32)
    assert facts.spilled and "spills" in facts.problems()[0]


def test_too_much_shared_memory_is_found():
    wide = one_of("attention_forward", HEAD_DIM=128)
    facts = audit.audit(replace(wide, constexprs=wide.constexprs | dict(BLOCK=128, INNER=128), num_stages=4), 86)
    assert any("shared memory" in problem for problem in facts.problems())


def test_a_product_without_tensor_cores_is_found():
    facts = audit.audit(replace(one_of("attention_forward", "fp32", HEAD_DIM=64, PRECISION="ieee"), gemm=True), 80)
    assert "has no tensor-core instruction HMMA" in facts.problems()


def test_the_key_changes_with_the_code():
    spec = one_of("attention_forward", HEAD_DIM=64)
    other_tile = replace(spec, constexprs=spec.constexprs | dict(INNER=2 * spec.constexprs["INNER"]))
    variants = [(spec, 80), (spec, 90), (other_tile, 80), (replace(spec, num_warps=8), 80)]
    assert len({audit.key_of(*variant) for variant in variants}) == len(variants)
    assert audit.key_of(spec, 80) == audit.key_of(spec, 80)


@pytest.mark.parametrize("kernel", ["attention_backward", "gelu_ffn_backward", "lm_project", "embed_rows"])
def test_the_ir_is_one_for_all_architectures(kernel):
    """So that keys need not make it for each."""
    assert audit.ir_of(one_of(kernel), 80) == audit.ir_of(one_of(kernel), 100)


@pytest.mark.parametrize(
    "registers, shared, warps, arch, blocks",
    [
        (128, 24576, 4, 80, 4),
        (168, 24576, 4, 86, 3),
        (255, 0, 4, 80, 2),
        (32, 0, 1, 86, 16),
        (64, 101376, 4, 86, 1),
        (64, 101377, 4, 86, 0),
    ],
)
def test_occupancy_is_cudas(registers, shared, warps, arch, blocks):
    """By hand from the rules of CUDA's programming guide; the last lacks the 1 KiB that the driver takes."""
    assert audit.blocks_per_sm(registers, shared, warps, audit.LIMITS[arch]) == blocks


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The interpreter's pytest processes, all started at once."""
    runs = matrix.start(tmp_path_factory.mktemp("interpreted"))
    yield runs
    for run in runs.values():
        run.process.kill()
        run.process.wait()


@pytest.mark.parametrize("part", matrix.PARTS)
def test_in_the_interpreter(part, interpreted):
    run = interpreted[part]
    output = run.finish()
    assert run.process.returncode == 0, output[-6000:]


def test_the_table_of_results_is_found_again(interpreted):
    if not matrix.TABLE.exists():
        pytest.skip("there is no table yet; `make proof` makes it")
    for run in interpreted.values():
        run.finish()
    assert matrix.rows(run.record for run in interpreted.values()) == matrix.read(), "run `make proof`"


def test_planted_faults_are_rejected_by_a_qualification():
    """One a file, each a machine whose kernels have it: none is proven, so none is ever chosen."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "triton_proof.qualified_mutants", "one"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    right, *found = map(json.loads, done.stdout.splitlines())
    assert right[2] == "proven", right
    assert done.returncode == 0 and len(found) > 12, done.stderr[-2000:]
    assert [row for row in found if row[2] == "proven" and tuple(row[:2]) not in HARMLESS] == []


# Whose results are right: what is wrong is that two programs write one value.
HARMLESS = {("contact_map", "both mirror images")}


@pytest.mark.parametrize("kernel", ["input_grad", "gelu_ffn_backward", "linear", "attention_backward"])
def test_tiles_are_loaded_16_bytes_at_a_time(kernel):
    from triton_proof import widths

    spec = one_of(kernel, **({"HEAD_DIM": 64} if kernel.startswith("attention") else {}))
    assert widths.loads_of(widths.layouts_of(spec, 80)) and widths.narrow(spec, 80) == []
    if "N" in spec.constexprs:  # a smaller ESM-2's width, no multiple of a tile
        assert widths.narrow(replace(spec, constexprs=spec.constexprs | dict(N=320)), 90) == []


def test_columns_that_may_be_any_are_seen_as_narrow_loads(tmp_path):
    """The fault that `linear.py` had: a minimum over the columns of a matrix whose columns lie side by side."""
    from triton_proof import widths

    text = (source.KERNELS / "linear.py").read_text()
    assert "    if W_N != 1:\n" in text
    (tmp_path / "linear.py").write_text(text.replace("    if W_N != 1:\n", "    if W_N != 0:\n"))
    name = "esm_fast.kernels.triton.clamped"
    made = importlib.util.spec_from_file_location(name, tmp_path / "linear.py")
    clamped = importlib.util.module_from_spec(made)
    made.loader.exec_module(clamped)
    spec = one_of("input_grad")
    assert {load.bytes for load in widths.narrow(replace(spec, jit_fn=clamped.input_grad), 80)} == {2}
