"""What is said of the GPU kernels: the tables, the matrix that is made of them, the estimates."""

import re
import sys
from pathlib import Path

import pytest

from esm_fast.cli import kernels, main
from esm_fast.ops import OPS

sys.path.append(str(Path(__file__).parents[2] / "benches"))

import roofline  # noqa: E402

ROOT = Path(__file__).parents[2]


def implemented(backend: str) -> set[str]:
    """The ops that a backend has a kernel for, from its source: its library need not be installed."""
    source = "".join(path.read_text() for path in (ROOT / "kernels" / backend).glob("*.py"))
    return set(re.findall(r'@implements\(\s*"(\w+)"', source))


PROVEN = implemented("triton")


def test_ops_without_a_kernel_on_gpus_are_those_that_the_docs_name():
    (told,) = re.findall(r"Ops without a kernel of ours on GPUs: (.*?)\n\n", (ROOT / "docs/gpu.md").read_text(), re.S)
    named = set(re.findall(r"`(\w+)`", told)) & set(OPS)
    assert PROVEN and implemented("cuda") and named
    assert set(OPS) - PROVEN - implemented("cuda") == named


# --- the tables ------------------------------------------------------------------------------------------------------


@pytest.fixture
def audit():
    triton = pytest.importorskip("triton")
    from triton_proof import audit

    if triton.__version__ != audit.TRITON_VERSION:
        pytest.skip(f"the table is Triton {audit.TRITON_VERSION}'s, this is {triton.__version__}")
    return audit


def test_every_compilation_that_ships_is_in_the_table(audit):
    """By its key, which changes with the kernel's IR, its tiles and Triton's version."""
    shipped = {audit.key_of(spec, arch): f"{spec.kernel_name} {spec.dtype} sm_{arch}" for spec, arch in
               audit.compilations()}  # fmt: skip
    table = audit.read_table()
    unknown = sorted({name for key, name in shipped.items() if key not in table})
    assert not unknown, f"not audited as they are: {unknown}; run `make proof`"
    assert table.keys() == shipped.keys(), "kernels/triton/audit.csv has rows that no longer ship; run `make proof`"


def test_no_compilation_in_the_table_has_a_problem(audit):
    assert [f"{facts} {problem}" for facts in audit.read_table().values() for problem in facts.problems()] == []


@pytest.mark.parametrize(
    "kernel, arch, change, problem",
    [
        ("attention_forward", 80, dict(spilled=8), "spills 8 bytes"),
        ("attention_forward", 86, dict(shared=100 << 10), "shared memory"),
        ("attention_forward", 89, dict(blocks=1), "not for 2"),
        ("attention_backward", 80, dict(blocks=1), "not for 2"),
        ("attention_backward", 90, dict(tensor_core=0), "HGMMA"),
        ("linear", 90, dict(tensor_core=0, gemm=0), "HGMMA"),
        ("attention_forward", 100, dict(tensor_core=0, gemm=0), "UTC"),
        ("linear", 120, dict(blocks=0), "does not fit"),
    ],
)
def test_a_doctored_compilation_is_found(audit, kernel, arch, change, problem):
    facts = next(f for f in audit.read_table().values() if (f.kernel, f.arch, f.dtype) == (kernel, arch, "bf16"))
    assert facts.problems() == []
    (found,) = facts._replace(**change).problems()
    assert problem in found


def test_no_compilation_takes_more_registers_than_it_may(audit):
    from triton_proof import ceilings

    table = audit.read_table().values()
    assert [problem for facts in table for problem in ceilings.problems(facts)] == []
    assert {facts.kernel for facts in table} == ceilings.WARPS.keys()


@pytest.mark.parametrize(
    "kernel, arch, dtype, change, problem",
    [
        ("attention_forward", 80, "bf16", dict(registers=169), "169 registers, more than 168"),
        ("attention_forward", 90, "fp16", dict(registers=241), "241 registers, more than 240"),
        ("attention_backward", 86, "fp16", dict(registers=185), "185 registers, more than 184"),
        ("attention_backward", 89, "bf16", dict(blocks=1), "4 warps on an SM, fewer than 8"),
        ("linear", 120, "fp32", dict(registers=169), "169 registers, more than 168"),
        ("layer_norm_forward", 100, "fp16", dict(blocks=1), "8 warps on an SM, fewer than 16"),
        ("masked_softmax_forward", 80, "bf16", dict(registers=65), "65 registers, more than 64"),
        ("pool_rows", 80, "fp32", dict(kernel="pool_all"), "no ceiling"),
    ],
)
def test_doctored_registers_are_found(audit, kernel, arch, dtype, change, problem):
    from triton_proof import ceilings

    wanted = (kernel, arch, dtype)
    facts = next(f for f in audit.read_table().values() if (f.kernel, f.arch, f.dtype) == wanted)
    assert ceilings.problems(facts) == []
    (found,) = ceilings.problems(facts._replace(**change))
    assert problem in found


def test_every_product_is_known_to_be_one(audit):
    """The audit asks the kernels that multiply for tensor cores by name, whatever their specs say."""
    table = audit.read_table().values()
    assert {facts.kernel for facts in table if facts.gemm} == audit.PRODUCTS
    assert all(facts.gemm for facts in table if facts.kernel in audit.PRODUCTS and facts.dtype != "fp32")


def test_no_op_moves_more_than_it_may():
    matrix = pytest.importorskip("triton_proof.matrix")
    assert matrix.problems(matrix.read()) == []


@pytest.mark.parametrize("change, problem", [(dict(distinct="1.16"), "moves 1.16"), (dict(distinct=""), "not counted")])
def test_doctored_traffic_is_found(change, problem):
    matrix = pytest.importorskip("triton_proof.matrix")
    table = [row._replace(**change) if row.distinct and row.op == "attention_varlen" else row for row in matrix.read()]
    found = matrix.problems(table)
    assert len(found) == 2 and all(problem in line for line in found)


def test_the_table_of_results_has_every_case():
    """That they pass is for test_triton.py; here, that none was left out."""
    matrix = pytest.importorskip("triton_proof.matrix")
    cases = {row.op: int(row.cases) for row in matrix.read()}
    assert cases == {name: len(OPS[name].cases()) for name in PROVEN}


# --- the matrix ------------------------------------------------------------------------------------------------------


def test_the_matrix_has_no_hole(capsys):
    assert main(["kernels", "--matrix"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.split("\n\n")[0].splitlines()]
    assert lines[0][4:10] == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
    wanted = {(op, way, dtype) for op in PROVEN for way in ("fwd", "bwd") for dtype in ("fp32", "fp16", "bf16")}
    assert {tuple(line[:3]) for line in lines[1:]} == wanted
    for line in lines[1:]:
        assert int(line[3]) > 0 and line[4] == "cases" and line[5:11] == ["ok"] * 6, line


def test_the_facts_of_every_kernel_are_printed(capsys):
    assert main(["kernels"]) == 0
    assert "attention_forward" in capsys.readouterr().out


RAN = dict(op="pool", direction="fwd", dtype="float16", cases="3", kernels="a b", distinct="", requested="")
SOUND = dict(dtype="fp16", arch="80", gemm="1", spilled="0", tensor_core="4", blocks="2")


@pytest.mark.parametrize(
    "row, cell",
    [
        (dict(kernel="b"), "ok"),
        (dict(kernel="c"), "-"),
        (dict(kernel="b", dtype="bf16"), "-"),
        (dict(kernel="b", dtype="fp32"), "ok"),  # a kernel that knows fp32 alone serves the stream of every model
        (dict(kernel="b", spilled="4"), "-"),
        (dict(kernel="b", blocks="0"), "-"),
        (dict(kernel="b", tensor_core="0"), "-"),
        (dict(kernel="b", tensor_core="0", gemm="0"), "ok"),
    ],
)
def test_a_cell_is_ok_only_if_every_kernel_that_ran_is(row, cell):
    compiled = [SOUND | dict(kernel="a"), SOUND | row]
    assert kernels.matrix([RAN], compiled)[1][4] == cell


# --- estimates -------------------------------------------------------------------------------------------------------


def test_the_roofline_is_labelled_and_bounded(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert roofline.main(["--plot", str(tmp_path / "roofline.png")]) == 0
    out = capsys.readouterr().out
    assert out.count("ESTIMATE, not measured") == len(roofline.GPUS)
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    gpu = roofline.GPUS[1]
    for estimate in roofline.estimates(gpu, "bfloat16"):
        assert estimate.microseconds >= 0.999e6 * estimate.bytes / gpu.bandwidth
        assert estimate.microseconds >= 0.999e6 * estimate.flops / gpu.half
