"""The CPU kernels at every instruction-set level of this machine, against the rule every backend is held to."""

import itertools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_levels import FLAGS, HALF_AND_FULL, kernel, relaxed, run
from hypothesis import given
from hypothesis import strategies as st
from runnable import require_runnable

from esm_fast import _C
from esm_fast.ops import OPS, registry, verify
from esm_fast.ops.contact_map import _case as contact_case
from esm_fast.ops.gelu_ffn import _case as ffn_case
from esm_fast.ops.pre_ln_attention import _case as attention_case

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cpu" / "kernels.cpp"
OURS = [name for name in OPS if any(k.backend == "cpu" for k in registry.kernels(name))]


# --- right at every level --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, case, dtype",
    [
        pytest.param(name, case, dtype, id=f"{name}-{case.name}-{str(dtype)[6:]}")
        for name in OURS
        for case, dtype in itertools.product(OPS[name].cases(), HALF_AND_FULL)
    ],
)
def test_every_case_at_every_level(isa, name, case, dtype):
    require_runnable(OPS[name], kernel(name), case, dtype, "cpu")
    for check in verify.forward(OPS[name], kernel(name), case, dtype, "cpu"):
        assert check.ok, check


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_q_and_k_come_back_as_the_attention_saw_them(isa, dtype):
    op = OPS["pre_ln_attention"]
    for case in (attention_case("plain", [5, 0, 33], 3, 20), attention_case("rotary", [5, 33], 2, 16, rotary=True)):
        build = case.build

        def with_qk(*where, build=build):
            return {**build(*where), "return_qk": True}

        for check in verify.forward(op, kernel(op.name), case._replace(build=with_qk), dtype, "cpu"):
            assert check.ok, (case.name, check)


@relaxed
@given(
    st.integers(1, 70), st.integers(2, 130), st.integers(1, 150), st.sampled_from(HALF_AND_FULL), st.integers(0, 2**31)
)
def test_any_shape_of_ffn(isa, rows, width, hidden, dtype, seed):
    case = ffn_case("random", rows, width, hidden)
    for check in verify.forward(OPS["gelu_ffn"], kernel("gelu_ffn"), case, dtype, "cpu", seed):
        assert check.ok, check


@relaxed
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(any),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from(HALF_AND_FULL),
    st.integers(0, 2**31),
)
def test_any_shape_of_attention(isa, lengths, heads, half_dim, dtype, seed):
    case = attention_case("random", lengths, heads, 2 * half_dim)
    for check in verify.forward(OPS["pre_ln_attention"], kernel("pre_ln_attention"), case, dtype, "cpu", seed):
        assert check.ok, check


@relaxed
@given(
    st.lists(st.integers(0, 130), min_size=1, max_size=3).filter(any),
    st.integers(1, 5),
    st.integers(1, 20),
    st.sampled_from(HALF_AND_FULL),
    st.integers(0, 2**31),
)
def test_any_shape_of_contacts(isa, lengths, heads, half_dim, dtype, seed):
    case = contact_case("random", lengths, heads, 2 * half_dim)
    for check in verify.forward(OPS["contact_map"], kernel("contact_map"), case, dtype, "cpu", seed):
        assert check.ok, check


def test_full_width_rows(isa):
    """ESM-1b's own sizes: sums of 5,120 products, and of 1,280."""
    cases = {"gelu_ffn": ffn_case("full", 25, 320, 5120), "pre_ln_attention": attention_case("full", [40], 20, 64)}
    for (name, case), dtype in itertools.product(cases.items(), HALF_AND_FULL):
        for check in verify.forward(OPS[name], kernel(name), case, dtype, "cpu"):
            assert check.ok, (name, dtype, check)


def test_nan_and_infinity_stay_in_their_own_rows(isa):
    """A row's garbage must reach neither another row nor another sequence."""
    for dtype in HALF_AND_FULL:
        arguments = ffn_case("poison", 30, 64, 100).build(dtype, "cpu", 0)
        clean = run("gelu_ffn", **arguments)[0]
        arguments["x"] = arguments["x"].clone()
        arguments["x"][13, 5], arguments["x"][14] = float("nan"), float("inf")
        out = run("gelu_ffn", **arguments)[0]
        assert out[13].isnan().all() and not out[14].isfinite().any()
        others = torch.arange(30)[torch.arange(30).sub(13.5).abs() > 1]
        assert torch.equal(out[others], clean[others])

        arguments = attention_case("poison", [7, 33, 20], 2, 20).build(dtype, "cpu", 0)
        clean = run("pre_ln_attention", **arguments)[0]
        arguments["x"] = arguments["x"].clone()
        arguments["x"][10, 5] = float("nan")
        out = run("pre_ln_attention", **arguments)[0]
        assert out[7:40].isnan().all()
        assert torch.equal(out[:7], clean[:7]) and torch.equal(out[40:], clean[40:])


# --- the same bits for any batch and any number of threads -----------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_a_protein_has_the_same_bits_in_any_batch(isa, threads, dtype):
    lengths = [33, 1, 70, 20]
    arguments = attention_case("batch", lengths, 4, 24).build(dtype, "cpu", 0)
    ffn = ffn_case("batch", sum(lengths), 96, 200).build(dtype, "cpu", 1)

    def both(rows, ends):
        x = arguments["x"][rows]
        ends = torch.tensor(ends, dtype=torch.int32)
        x = run("pre_ln_attention", **{**arguments, "x": x, "cu_seqlens": ends, "max_seqlen": 70})[0]
        return run("gelu_ffn", **{**ffn, "x": x})[0]

    ends = [0, *itertools.accumulate(lengths)]
    threads(1)
    together = both(slice(None), ends)
    for n in (1, 2, 3, 5):
        threads(n)
        assert torch.equal(both(slice(None), ends), together)
        for start, end in itertools.pairwise(ends):
            assert torch.equal(both(slice(start, end), [0, end - start]), together[start:end])
        assert _C.threads() == n or "ESM_FAST_THREADS" in os.environ


def test_contacts_have_the_same_bits_for_any_number_of_threads(isa, threads):
    arguments = contact_case("threads", [250, 3], 3, 16).build(torch.bfloat16, "cpu", 0)
    threads(1)
    alone = run("contact_map", **arguments)[0]
    for n in (2, 3):
        threads(n)
        assert torch.equal(run("contact_map", **arguments)[0], alone)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_offsets_that_leave_the_rows_are_refused():
    arguments = attention_case("wrong", [5, 9], 2, 16).build(torch.bfloat16, "cpu", 0)
    for wrong in ([0, 5, 15], [0, 5], [1, 5, 14], [0, 9, 5, 14]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of rows, 14"):
            run("pre_ln_attention", **{**arguments, "cu_seqlens": torch.tensor(wrong, dtype=torch.int32)})


def test_weights_of_two_dtypes_are_refused():
    arguments = ffn_case("mixed", 3, 32, 64).build(torch.bfloat16, "cpu", 0)
    arguments["fc2_weight"] = arguments["fc2_weight"].float()
    with pytest.raises(ValueError, match="weights of one dtype"):
        run("gelu_ffn", **arguments)


# --- prepacked weights -----------------------------------------------------------------------------------------------


def test_changed_weights_are_packed_again():
    arguments = ffn_case("changing", 5, 64, 128).build(torch.bfloat16, "cpu", 0)
    weight = arguments["fc1_weight"]

    def fresh():
        copies = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        return run("gelu_ffn", **copies)[0]

    def same_as_fresh():
        return torch.equal(run("gelu_ffn", **arguments)[0], fresh())

    assert same_as_fresh()
    weight.mul_(2)  # in place
    assert same_as_fresh()
    weight.data = weight.data * -1  # another storage
    assert same_as_fresh()
    weight.data.neg_()  # unseen by autograd's version counter
    assert same_as_fresh()
    arguments["fc1_weight"] = weight = weight.t().contiguous().t()  # strides
    assert same_as_fresh()
    weight.mul_(3)
    assert same_as_fresh()
    with torch.inference_mode():  # tensors without a version counter
        arguments["fc1_weight"] = weight = torch.ones(128, 64, dtype=torch.bfloat16)
        assert same_as_fresh()
        weight.neg_()
        assert same_as_fresh()


@pytest.mark.parametrize("edit", ["data", "numpy", "detached"])
def test_no_edit_is_missed_where_autograd_does_not_see_it(edit):
    """Every single element: a sample of them would miss most."""
    arguments = ffn_case("edited", 5, 40, 72).build(torch.float32, "cpu", 0)
    weight = arguments["fc1_weight"]
    view = {"data": weight.data, "numpy": weight.numpy(), "detached": weight.detach().data}[edit]
    for row in range(72):
        before = run("gelu_ffn", **arguments)[0]
        view[row, row % 40] = 3.0 + row
        after = run("gelu_ffn", **arguments)[0]
        fresh = run("gelu_ffn", **{**arguments, "fc1_weight": weight.clone()})[0]
        assert torch.equal(after, fresh) and not torch.equal(after, before)


def test_packed_weights_are_kept_once_and_freed_with_their_tensor():
    from esm_fast.kernels.cpu import weights

    weight = torch.randn(64, 96).bfloat16()
    (first,) = weights.prepacked(weight)
    assert weights.prepacked(weight)[0] is first and first.nbytes == weight.numel() * 2
    before = len(weights._prepacked)
    del weight
    assert len(weights._prepacked) == before - 1


def test_bf16_panels_are_whole_amx_tiles():
    """32 outputs and a multiple of 32 inputs; fp32 pads the outputs alone."""
    from esm_fast.kernels.cpu import weights

    assert weights.prepacked(torch.ones(33, 65).bfloat16())[0].nbytes == 64 * 96 * 2
    assert weights.prepacked(torch.ones(33, 65))[0].nbytes == 64 * 65 * 4


# --- levels ----------------------------------------------------------------------------------------------------------


def test_unasked_only_where_it_was_measured_faster(isa):
    request = registry.Request("cpu", None, torch.bfloat16, 64, False, level=isa)
    chosen = isa != "base"
    for name in OURS:
        ours = kernel(name)
        assert not ours.why_not(request) and bool(ours.yields(request)) is not chosen
        with_gradients = "".join(ours.yields(request._replace(grad=True)))
        slower = name == "masked_lm_head" or (ours.backward is None and ours.differentiable is None)
        assert ("gradients" in with_gradients) == slower
        assert "even head_dim" in "".join(ours.why_not(request._replace(head_dim=17)))
        assert "float16" in "".join(ours.why_not(request._replace(dtype=torch.float16)))


def in_a_process(code, **variables):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **variables})


def test_the_environment_forces_a_level():
    show = "from esm_fast import _C; print(_C.isa())"
    for name in _C.isas():
        assert in_a_process(show, ESM_FAST_ISA=name).stdout.strip() == name
    unknown = in_a_process(show, ESM_FAST_ISA="mmx")
    assert unknown.returncode and "no instruction set 'mmx'; choose one of base" in unknown.stderr
    assert in_a_process(show, ESM_FAST_ISA="").stdout.strip() == _C.isas()[-1]


def test_an_impossible_level_is_refused_by_name():
    missing = [name for name in FLAGS if name not in _C.isas()] if platform.machine() == "x86_64" else []
    for name in missing:
        with pytest.raises(ValueError, match=f"does not run the instruction set '{name}'"):
            _C.set_isa(name)
    with pytest.raises(ValueError, match="no instruction set 'neon9'"):
        _C.set_isa("neon9")


def test_levels_have_an_order(isa):
    """Also those that were not built, or do not run here: `isa` is the level in use."""
    order = list(FLAGS)
    assert [_C.at_least(level) for level in order] == [order.index(isa) >= order.index(level) for level in order]


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm")
@pytest.mark.parametrize("level", FLAGS if platform.machine() == "x86_64" else ["base"])
def test_a_level_leaks_no_symbol(level, tmp_path):
    """Anything defined but the table could be merged with its namesake of another level, and crash an older CPU.

    Unoptimised, nothing is inlined, so that every function there is shows up. DW.ref. is a pointer of the exception
    tables, no code.
    """
    built = tmp_path / "kernels.o"
    flags = ["-std=c++17", "-O0", "-fPIC", f"-DESM_LEVEL={level}", *FLAGS[level].split()]
    subprocess.run(["g++", *flags, "-c", str(SOURCE), "-o", str(built)], check=True)
    lines = subprocess.run(["nm", "-C", str(built)], check=True, capture_output=True, text=True).stdout.splitlines()
    symbols = [line[17:].split(" ", 1) for line in lines]
    leaked = [name for kind, name in symbols if kind not in "Utdbr" and not name.startswith("DW.ref.")]
    assert leaked == [f"esm::cpu::kernels_{level}"]
