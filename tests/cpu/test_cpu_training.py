"""The CPU kernels with gradients: the backwards of our own, at every instruction-set level of this machine."""

import itertools

import pytest
import torch
from cpu_levels import HALF_AND_FULL, changed, kernel, relaxed
from esm_fast.kernels.cpu.weights import filled_up, product_of_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esm_fast.formats.int8 import Int8Weight
from esm_fast.formats.weight import PrepackedWeight
from esm_fast.ops import OPS, registry, verify
from esm_fast.ops.attention_varlen import _case
from esm_fast.ops.gelu_ffn import _case as ffn_case
from esm_fast.ops.masked_lm_head import _case as head_case
from esm_fast.ops.pre_ln_attention import _case as block_case

ATTENTION = OPS["attention_varlen"]
# Longer than a block of queries and than a chunk of keys, and neither's multiple.
LONG = _case("long", [200, 1, 65], 2, 16)


# Cases this small are slower on two, much slower where other processes have the cores.
pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(arguments, seed=0):
    """Those of a random projection of the output, by our kernel."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in "qkv"}
    out = ATTENTION(**{**arguments, **leaves}, backend="cpu")
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return torch.autograd.grad(out, list(leaves.values()), incoming)


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_every_case_at_every_level(isa, dtype):  # noqa: F811
    for case in [*ATTENTION.cases(), LONG]:
        for check in verify.gradients(ATTENTION, kernel("attention_varlen"), case, dtype, "cpu"):
            assert check.ok, (case.name, check)


# More rows than are summed up together, and not their multiple.
PARTS = {"pre_ln_attention": block_case("parts", [70, 1, 79], 2, 20), "gelu_ffn": ffn_case("parts", 150, 40, 37)}
HEAD = OPS["masked_lm_head"]
HEAD_PARTS = head_case("parts", 200, 40, masked=150)  # some rows more than once


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("name", PARTS)
def test_every_case_of_a_layers_halves(isa, name, dtype):  # noqa: F811
    for case in [*OPS[name].cases(), PARTS[name]]:
        for check in verify.gradients(OPS[name], kernel(name), case, dtype, "cpu"):
            assert check.ok, (case.name, check)


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_every_case_of_the_head(isa, dtype):  # noqa: F811
    ignored = changed(HEAD_PARTS, targets=lambda a: a["targets"].index_fill(0, torch.arange(0, 150, 4), -100))
    only_logits = changed(HEAD_PARTS, targets=None, rows=torch.tensor([-1, 3, 3, -5, 0, 150]))
    some = changed(head_case("some", 40, 24), rows=torch.arange(40) % 3 == 0)
    for case in [*HEAD.cases(), HEAD_PARTS, ignored, only_logits, some]:
        for check in verify.gradients(HEAD, kernel("masked_lm_head"), case, dtype, "cpu"):
            assert check.ok, (case.name, check)


@settings(relaxed, max_examples=8)
@given(
    st.integers(8, 150), st.integers(8, 130), st.integers(8, 150), st.sampled_from(HALF_AND_FULL), st.integers(0, 2**31)
)
def test_any_shape_of_ffn(isa, rows, width, hidden, dtype, seed):  # noqa: F811
    case = ffn_case("random", rows, width, hidden)
    for check in verify.gradients(OPS["gelu_ffn"], kernel("gelu_ffn"), case, dtype, "cpu", seed):
        assert check.ok, check


DRAWS = 4  # of a few hundred numbers the largest rounding of one draw says little


@settings(relaxed, max_examples=8)
@given(
    st.lists(st.integers(8, 150), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from(HALF_AND_FULL),
    st.integers(0, 2**31),
)
@example([17], 3, 27, torch.float32, 32350551)  # whose plain gradients are right by luck
def test_any_shape(isa, lengths, heads, half_dim, dtype, seed):  # noqa: F811
    case = _case("random", lengths, heads, 2 * half_dim)
    for check in verify.gradients(ATTENTION, kernel("attention_varlen"), case, dtype, "cpu", seed, DRAWS):
        assert check.ok, check


def test_three_times_the_allowed_error_fails():
    """In one number, however many draws estimate what is allowed: they differ by less than that."""
    case = _case("random", [17], 3, 54)

    def run(seed):
        arguments = case.build(torch.float32, "cpu", seed)
        return [verify.projected(ATTENTION.reference, of, seed) for of in (arguments, verify.widened(arguments))]

    for seed in (32350551, 0, 1):
        (plain, truth), *others = map(run, range(seed, seed + DRAWS))
        got = [t.clone() for t in truth]
        for g, p, t in zip(got, plain, truth, strict=True):
            g.view(-1)[5] += 3 * (3 * (p.double() - t).abs().max() + verify.FLOOR[torch.float32] * t.abs().max())
        checks = verify.compare("qkv", got, plain, truth, torch.float32, 3.0, 1.0, others)
        assert not any(check.ok for check in checks), checks


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_a_proteins_gradients_have_the_same_bits_in_any_batch(isa, threads, dtype):  # noqa: F811
    arguments = LONG.build(dtype, "cpu", 0)
    ends = arguments["cu_seqlens"].tolist()
    incoming = torch.randn(arguments["q"].shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    threads(1)
    together = gradients(arguments)
    for n in (2, 3):
        threads(n)
        assert all(map(torch.equal, gradients(arguments), together))
    for start, end in itertools.pairwise(ends):
        leaves = [arguments[name][start:end].clone().requires_grad_() for name in "qkv"]
        cu_seqlens = torch.tensor([0, end - start], dtype=torch.int32)
        out = ATTENTION(*leaves, cu_seqlens, end - start, arguments["scale"], backend="cpu")
        alone = torch.autograd.grad(out, leaves, incoming[start:end])
        assert all(torch.equal(a, t[start:end]) for a, t in zip(alone, together, strict=True))


def half_gradients(name, arguments, incoming):
    """{argument: gradient} of a layer's half, and its result."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in arguments.items() if verify.differentiable(t)}
    out = OPS[name](**{**arguments, **leaves}, backend="cpu")
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), incoming), strict=True)), out.detach()


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("name", PARTS)
def test_a_halfs_gradients_have_the_same_bits_in_any_batch(isa, threads, name, dtype):  # noqa: F811
    """Those of the matrices are torch's products, which may differ with the threads."""
    arguments = PARTS[name].build(dtype, "cpu", 0)
    incoming = torch.randn(arguments["x"].shape, generator=torch.Generator().manual_seed(0))
    threads(1)
    together, out = half_gradients(name, arguments, incoming)
    for n in (2, 3):
        threads(n)
        again, same = half_gradients(name, arguments, incoming)
        assert torch.equal(same, out)
        assert all(torch.equal(again[key], g) for key, g in together.items() if key == "x" or g.ndim == 1)
    start, end = 71, 150  # the last sequence
    part = {**arguments, "x": arguments["x"][start:end]}
    if "cu_seqlens" in arguments:
        part |= {"cu_seqlens": torch.tensor([0, end - start], dtype=torch.int32), "max_seqlen": end - start}
    alone, same = half_gradients(name, part, incoming[start:end])
    assert torch.equal(same, out[start:end]) and torch.equal(alone["x"], together["x"][start:end])


def head_gradients(arguments, use):
    """{argument: gradient} of what `use` makes of logits and loss, and these two."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in arguments.items() if verify.differentiable(t)}
    logits, loss = HEAD(**{**arguments, **leaves}, backend="cpu")
    found = torch.autograd.grad(use(logits, loss), list(leaves.values()))
    return dict(zip(leaves, found, strict=True)), logits.detach(), loss.detach()


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_the_heads_gradients_have_the_same_bits_on_any_number_of_threads(isa, threads, dtype):  # noqa: F811
    arguments = HEAD_PARTS.build(dtype, "cpu", 0)
    threads(1)
    expected, *outputs = head_gradients(arguments, lambda logits, loss: loss / 150)
    for n in (2, 3):
        threads(n)
        again, *same = head_gradients(arguments, lambda logits, loss: loss / 150)
        assert all(map(torch.equal, same, outputs))
        assert all(torch.equal(again[key], g) for key, g in expected.items() if key == "x" or g.ndim == 1)
    assert all(map(torch.equal, HEAD(**arguments, backend="cpu"), outputs))  # as without gradients


def test_gradients_of_logits_and_loss_add_up():
    arguments = HEAD_PARTS.build(torch.float32, "cpu", 0)
    both, loss, logits = (
        head_gradients(arguments, use)[0]
        for use in (lambda a, b: a.sum() + 3 * b, lambda a, b: 3 * b, lambda a, b: a.sum())
    )
    for key, gradient in both.items():
        torch.testing.assert_close(
            loss[key] + logits[key], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max())
        )


def test_a_head_whose_matrices_are_frozen_plain_or_packed():
    arguments = HEAD_PARTS.build(torch.float32, "cpu", 0)
    expected = head_gradients(arguments, lambda logits, loss: loss)[0]["x"]
    for frozen in (lambda matrix: matrix, PrepackedWeight.pack):
        x = arguments["x"].clone().requires_grad_()
        fixed = {key: frozen(arguments[key]) for key in ("dense_weight", "token_table")}
        HEAD(**{**arguments, **fixed, "x": x}, backend="cpu")[1].backward()
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("name", PARTS)
def test_frozen_matrices_plain_or_packed(name):
    """As under adapters, or where only a representation is to be changed: what is frozen gets no gradient."""
    arguments = PARTS[name].build(torch.float32, "cpu", 0)
    matrices = [key for key in arguments if key.endswith("_weight") and arguments[key].ndim == 2]
    incoming = torch.randn(arguments["x"].shape, generator=torch.Generator().manual_seed(0))
    expected, out = half_gradients(name, arguments, incoming)
    for frozen in (lambda matrix: matrix, PrepackedWeight.pack):
        x = arguments["x"].clone().requires_grad_()
        fixed = {key: frozen(arguments[key]) for key in matrices}
        got = OPS[name](**{**arguments, **fixed, "x": x}, backend="cpu")
        got.backward(incoming)
        assert torch.equal(got, out) and torch.equal(x.grad, expected["x"])
    fixed = {key: Int8Weight.pack(arguments[key]) for key in matrices}
    with pytest.raises(RuntimeError, match="8-bit weights have no gradients"):
        OPS[name](**{**arguments, **fixed, "x": x}, backend="cpu")


def test_nan_stays_in_its_own_sequence_and_head(isa):  # noqa: F811
    for dtype in HALF_AND_FULL:
        arguments = LONG.build(dtype, "cpu", 0)
        clean = gradients(arguments)
        arguments["k"][200, 1, 3] = float("nan")  # the sequence of one token
        for got, expected in zip(gradients(arguments), clean, strict=True):
            assert got[200, 1].isnan().any()
            got[200, 1] = expected[200, 1]
            assert torch.equal(got, expected)


def test_no_rows_and_no_sequences(isa):  # noqa: F811
    arguments = _case("empty", [0, 0], 2, 16).build(torch.float32, "cpu", 0)
    for ends in ([0], [0, 0, 0]):
        arguments["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
        assert [g.shape for g in gradients(arguments)] == [(0, 2, 16)] * 3


def test_chosen_unasked_with_gradients(isa):  # noqa: F811
    request = registry.Request("cpu", None, torch.bfloat16, 64, True)
    ours = "reference" if isa == "base" else "cpu"
    for name, expected in {
        "gelu_ffn": ours,
        "attention_varlen": ours,
        "pre_ln_attention": ours,
        "masked_lm_head": "reference",  # ours by name: no faster there
        "pool": "reference",
    }.items():
        able = [backend for backend, reasons in registry.explain(name, request) if not reasons]
        assert able[0] == expected


def test_products_meet_few_numbers_of_rows():
    sizes = [filled_up(rows) for rows in range(1, 4097)]
    assert len(set(sizes[2048:])) == 16 and len(set(sizes)) < 60
    assert all(rows <= size < rows + max(64, rows / 16) for rows, size in enumerate(sizes, start=1))
    a, b = torch.randn(100, 8).bfloat16(), torch.randn(100, 4).bfloat16()
    torch.testing.assert_close(product_of_rows(a, b), a.T @ b)
