"""What surrounds the layers on the CPU backend: its errors, its edges, and the same bits for any batch and threads."""

import itertools

import pytest
import torch
from cpu_levels import HALF_AND_FULL, changed, kernel, relaxed, run
from hypothesis import given
from hypothesis import strategies as st

from esm_fast.alphabet import MASK
from esm_fast.ops import OPS, verify
from esm_fast.ops.embedding import _case as embedding_case
from esm_fast.ops.masked_lm_head import _case as head_case
from esm_fast.ops.masked_softmax import _case as softmax_case
from esm_fast.ops.pool import _case as pool_case
from esm_fast.ops.pool_max import _case as max_case
from esm_fast.ops.pool_moments import _case as moments_case

EMBEDDING, HEAD, SOFTMAX = (OPS[n] for n in ("embedding", "masked_lm_head", "masked_softmax"))
POOLINGS = {
    "pool": pool_case,
    "pool_max": max_case,
    "pool_moments": lambda *sizes, **named: moments_case(pool_case(*sizes, **named)),
}


def check(op, case, dtype, seed=0):
    for found in verify.forward(op, kernel(op.name), case, dtype, "cpu", seed):
        assert found.ok, found


# --- right -----------------------------------------------------------------------------------------------------------

lengths_ = st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(any)
dtypes_, seeds_ = st.sampled_from(HALF_AND_FULL), st.integers(0, 2**31)


@relaxed
@given(lengths_, st.integers(2, 150), st.booleans(), st.booleans(), dtypes_, seeds_)
def test_any_shape_of_embedding(isa, lengths, width, norm, token_dropout, dtype, seed):
    check(EMBEDDING, embedding_case("random", lengths, width, norm=norm, token_dropout=token_dropout), dtype, seed)


@relaxed
@given(st.integers(1, 90), st.integers(4, 150), st.sampled_from([None, 1, 7, 50]), dtypes_, seeds_)
def test_any_shape_of_head(isa, rows, width, masked, dtype, seed):
    check(HEAD, head_case("random", rows, width, masked), dtype, seed)


@relaxed
@given(st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(1, 4), dtypes_, seeds_)
def test_any_shape_of_maps(isa, lengths, heads, dtype, seed):
    check(SOFTMAX, softmax_case("random", lengths, heads), dtype, seed)


@relaxed
@given(lengths_, st.integers(1, 600), st.booleans(), seeds_)
def test_any_shape_of_pool(isa, lengths, width, ends, seed):
    for name, case in POOLINGS.items():
        check(OPS[name], case("random", lengths, width, ends=ends), torch.float32, seed)


def test_the_largest_of_what_is_no_number_or_infinite(isa):
    """NaN where one counts, wherever it stands; minus infinity where all are; 0 where no row counts."""
    inf, nan = float("inf"), float("nan")
    columns = [[nan, 1, 2], [1, nan, 2], [2, 1, nan], [-inf] * 3, [-inf, inf, 1], [-3, -1, -2]]
    x = torch.tensor([*zip(*columns, strict=True), [9] * 6], dtype=torch.float32)
    offsets = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    found = run("pool_max", x=x, cu_seqlens=offsets, counted=torch.arange(4) < 3)[0]
    expected = torch.tensor([[nan, nan, nan, -inf, inf, -1], [0] * 6, [0] * 6])
    assert torch.equal(found.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_full_width(isa, dtype):
    check(HEAD, head_case("full", 40, 1280, masked=30), dtype)
    check(EMBEDDING, embedding_case("full", [40], 1280), dtype)


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_an_explicit_scale_takes_the_place_of_the_count(isa, dtype):
    case = embedding_case("scale", [5, 0, 9], 24)
    check(EMBEDDING, changed(case, scale=torch.tensor([-0.5, 7.0, 1.25])), dtype)
    check(EMBEDDING, changed(case, scale=torch.tensor([-0.5, 7.0, 1.25]), token_dropout=False), dtype)


def test_a_sequence_of_masks_and_garbage_in_the_mask_row(isa):
    """Its scale is infinite and the row of <mask> is never looked at: only the positions remain."""
    arguments = embedding_case("masks", [4, 6], 24, norm=False).build(torch.float32, "cpu", 0)
    arguments["tokens"][:4] = MASK
    arguments["token_table"][MASK] = float("nan")
    out = run("embedding", **arguments)[0]
    assert torch.equal(out[:4], arguments["position_table"][2:6])
    assert out.isfinite().all()


@pytest.mark.parametrize("rows", [torch.tensor([-1, 3, 3, -5]), torch.arange(5) % 2 == 0, torch.tensor([], dtype=int)])
def test_rows_are_those_of_torch_indexing(isa, rows):
    check(HEAD, changed(head_case("rows", 5, 40), rows=rows), torch.float32)


def test_rows_that_were_not_asked_for_are_not_read(isa):
    arguments = head_case("poison", 40, 64, masked=9).build(torch.bfloat16, "cpu", 0)
    clean = run("masked_lm_head", **arguments)
    asked = torch.zeros(40, dtype=bool).index_fill_(0, arguments["rows"], True)
    arguments["x"] = arguments["x"].float().masked_fill(~asked[:, None], float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(run("masked_lm_head", **arguments), clean, strict=True))


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_the_loss_of_no_rows_is_nothing(isa, dtype):
    """As where no token of a batch was selected."""
    arguments = head_case("none", 30, 40, masked=9).build(dtype, "cpu", 0)
    arguments |= {name: arguments[name][:0] for name in ("rows", "targets")}
    for grad in (False, True):
        arguments["dense_weight"].requires_grad_(grad)
        for _ in range(3):
            logits, loss = HEAD(**arguments, backend="cpu")
            assert logits.shape == (0, 33) and loss == 0
    loss.backward()
    assert not arguments["dense_weight"].grad.any()


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_ignored_targets_add_nothing(isa, dtype):
    case = head_case("ignored", 30, 40, masked=9)
    check(HEAD, changed(case, targets=lambda a: a["targets"].index_fill(0, torch.tensor([0, 5]), -100)), dtype)
    check(HEAD, changed(case, targets=lambda a: a["targets"].fill_(-100)), dtype)


def test_the_loss_holds_where_logits_are_far_apart(isa):
    case = head_case("far", 30, 40, masked=9)
    check(HEAD, changed(case, bias=lambda a: a["bias"] * 3000), torch.float32)


def test_lengths_beyond_the_scores_and_garbage_behind_the_lengths(isa):
    for dtype in HALF_AND_FULL:
        scores = torch.randn(4, 2, 21, 21).to(dtype)
        lengths = torch.tensor([50, -3, 0, 9])
        scores[3, :, 9:], scores[3, :, :, 9:] = float("nan"), float("inf")
        out = run("masked_softmax", scores=scores, lengths=lengths)[0]
        torch.testing.assert_close(out, SOFTMAX.reference(scores, lengths))
        assert not out[1:3].any() and not out[3, :, 9:].any() and not out[3, :, :, 9:].any()


def test_nan_stays_in_its_own_row_of_the_maps(isa):
    scores = torch.randn(1, 2, 21, 21)
    clean = run("masked_softmax", scores=scores, lengths=torch.tensor([21]))[0]
    poisoned = scores.clone()
    poisoned[0, 0, 7, 3] = float("nan")
    out = run("masked_softmax", scores=poisoned, lengths=torch.tensor([21]))[0]
    assert out[0, 0, 7].isnan().all()
    out[0, 0, 7] = clean[0, 0, 7]
    assert torch.equal(out, clean)


def test_inputs_in_any_layout(isa):
    cases = {
        "embedding": embedding_case("layout", [5, 9], 24),
        "masked_lm_head": head_case("layout", 30, 40, masked=9),
        "masked_softmax": softmax_case("layout", [31, 20], 2),
        "pool": pool_case("layout", [5, 9], 24),
    }
    for name, case in cases.items():
        arguments = case.build(torch.float32, "cpu", 0)
        strided = {
            n: torch.stack([v, v], -1)[..., 0] if isinstance(v, torch.Tensor) else v for n, v in arguments.items()
        }
        for a, b in zip(run(name, **strided), run(name, **arguments), strict=True):
            assert torch.equal(a, b)


# --- the same bits for any batch and any number of threads -----------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_the_same_bits_in_any_batch(isa, threads, dtype):
    lengths = [33, 1, 70, 20]
    ends = [0, *itertools.accumulate(lengths)]
    embedded = embedding_case("batch", lengths, 72).build(dtype, "cpu", 0)
    head = head_case("batch", sum(lengths), 72).build(dtype, "cpu", 1)
    weight = torch.rand(sum(lengths))

    def through(first, last, ends):
        ends = torch.tensor(ends, dtype=torch.int32)
        part = {n: embedded[n][first:last] for n in ("tokens", "positions")}
        x = run("embedding", **{**embedded, **part, "cu_seqlens": ends})[0]
        logits, loss = run(
            "masked_lm_head", **{**head, "x": x, "rows": torch.arange(len(x)), "targets": part["tokens"].long()}
        )
        taken = {"pool": weight, "pool_max": weight > 0.1, "pool_moments": weight}
        pooled = [kernel(name).forward(x, ends, rows[first:last]) for name, rows in taken.items()]
        return x, logits, *pooled, loss

    threads(1)
    together = through(0, ends[-1], ends)
    for n in (1, 2, 3, 5):
        threads(n)
        assert all(torch.equal(a, b) for a, b in zip(through(0, ends[-1], ends), together, strict=True))
        for i, (start, end) in enumerate(itertools.pairwise(ends)):
            x, logits, *pooled, _ = through(start, end, [0, end - start])
            assert torch.equal(x, together[0][start:end]) and torch.equal(logits, together[1][start:end])
            assert all(torch.equal(one[0], all_[i]) for one, all_ in zip(pooled, together[2:-1], strict=True))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [("tokens", 33), ("tokens", -1), ("positions", 16), ("positions", -(2**31))])
def test_ids_out_of_the_tables_are_refused(isa, name, value):
    arguments = embedding_case("wrong", [5, 14], 24).build(torch.float32, "cpu", 0)
    arguments[name][3] = value
    for backend in ("cpu", "reference"):
        with pytest.raises(IndexError):
            EMBEDDING(**arguments, backend=backend)
    with pytest.raises(IndexError, match=rf"{name[:-1]} {value} \(number 3\) is not in the table, which has rows 0 to"):
        kernel("embedding").forward(*EMBEDDING.bind((), arguments).values())  # should a check ever miss it


def test_rows_and_targets_out_of_range_are_refused(isa):
    arguments = head_case("wrong", 20, 40, masked=5).build(torch.float32, "cpu", 0)
    for name, value in (("rows", 20), ("rows", -21), ("targets", 33), ("targets", -1)):
        wrong = arguments | {name: arguments[name].index_fill(0, torch.tensor(2), value)}
        for backend in ("cpu", "reference"):
            with pytest.raises(IndexError):
                HEAD(**wrong, backend=backend)
    for count in (4, 6):
        with pytest.raises(ValueError, match="one for each of the 5 rows"):
            run("masked_lm_head", **arguments | {"targets": torch.zeros(count, dtype=torch.long)})


def test_wrong_offsets_are_refused(isa):
    wrong = torch.tensor([0, 5, 30], dtype=torch.int32)
    for name, case in (("embedding", embedding_case("wrong", [5, 9], 24)), ("pool", pool_case("wrong", [5, 9], 24))):
        arguments = case.build(torch.float32, "cpu", 0) | {"cu_seqlens": wrong}
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of rows, 14"):
            run(name, **arguments)
    with pytest.raises(ValueError, match=r"scale must be \(sequences,\)"):
        run(
            "embedding", **embedding_case("wrong", [5, 9], 24).build(torch.float32, "cpu", 0) | {"scale": torch.ones(3)}
        )
