"""Bits that depend on nothing but the variant, and work that is done once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import esm_fast
from esm_fast import _C, variants
from esm_fast.variants.bind import bind
from esm_fast.variants.parse import parse
from esm_fast.variants.scores import Asked, Job, scans, scores_of
from esm_fast.variants.strategies import strategies

STRATEGIES = sorted(strategies())


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request, fair_checkpoint):
    return esm_fast.load(fair_checkpoint, dtype=request.param)[0]


def names_of(text, count, seed=0):
    choose = np.random.default_rng(seed)
    at = choose.permutation(len(text))[:count]
    return [f"{text[i]}{i + 1}{'W' if text[i] != 'W' else 'A'}" for i in at.tolist()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batches_order_neighbours_and_threads_do_not_change_a_bit(model, protein, strategy):
    text = protein(31)
    names = names_of(text, 6)
    names += [":".join(names[:2]), ":".join(names[3:6])]
    together = variants.score(model, text, names, strategy=strategy)
    for budget in (1, 50, 100_000):
        np.testing.assert_array_equal(
            variants.score(model, text, names, strategy=strategy, batch_tokens=budget), together
        )
    alone = [variants.score(model, text, [name], strategy=strategy)[0] for name in names]
    np.testing.assert_array_equal(alone, together)
    turned = variants.score(model, text, names[::-1] + names, strategy=strategy)
    np.testing.assert_array_equal(turned, [*together[::-1], *together])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        np.testing.assert_array_equal(variants.score(model, text, names, strategy=strategy), together)
    finally:
        torch.set_num_threads(before)
        _C.set_threads(before)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plans_that_are_cut_into_parts_change_no_bit_and_compute_nothing_twice(model, protein, strategy, monkeypatch):
    text = protein(23)
    singles = names_of(text, 6)
    names = [*singles, "=", f"{singles[0]}:{singles[1]}", *(f"{name[:-1]}Y" for name in singles if name[0] != "Y")]
    names += [f"{text[4]}5*", f"{text[11]}12*"] if strategy == "pllr" else []

    def computed():
        done = []
        return variants.score(model, text, names, strategy=strategy, on_batch=done.append), sum(done)

    whole, cost = computed()
    monkeypatch.setattr("esm_fast.variants.scores._PLAN_TOKENS", 60)
    parts, cost_of_parts = computed()
    np.testing.assert_array_equal(parts, whole)
    assert cost_of_parts == cost


@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from("ACDEFGHIKLMNPQRSTVWY")), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_any_list_of_variants_is_scored_row_by_row(ours, picks):
    text = "MKTAYIAKQRQIS"
    names = [f"{text[at]}{at + 1}{new}" for at, new in picks]
    matrix = variants.scan(ours, text)
    expected = [matrix[at, "ACDEFGHIKLMNPQRSTVWY".index(new)] for at, new in picks]
    np.testing.assert_array_equal(variants.score(ours, text, names), expected)


def tokens_computed(run):
    done = []
    run(done.append)
    return sum(done)


def test_each_context_is_computed_once(ours, protein):
    text = protein(20)
    every = [
        f"{residue}{i + 1}{new}" for i, residue in enumerate(text) for new in "ACDEFGHIKLMNPQRSTVWY" if new != residue
    ]

    def cost(names, **options):
        return tokens_computed(lambda note: variants.score(ours, text, names, on_batch=note, **options))

    assert cost(every) == 22
    assert cost(every, strategy="masked") == 20 * 22
    assert cost(every, strategy="masked-joint") == 20 * 22
    assert cost(every, strategy="mutant") == 20 * 22  # a lone mutation is under its own mask
    pairs = [f"{a}:{b}" for a in every[:19] for b in every[19:38]]
    assert cost(pairs, strategy="masked-joint") == 22
    assert cost(pairs, strategy="masked") == 2 * 22
    assert cost(pairs, strategy="mutant") == 38 * 22
    # Of the 19 proteins with a change at residue 1, and the wild type, the passes that mask it are the same.
    assert cost([*every[:19], "="], strategy="pll") == (20 * 19 + 1) * 22
    assert cost(["=", "A1A" if text[0] == "A" else f"{text[0]}1{text[0]}"], strategy="wt") == 0
    assert tokens_computed(lambda note: variants.scan(ours, text, strategy="masked", on_batch=note)) == 20 * 22


def test_contexts_are_shared_by_strategies_stops_and_proteins(ours, protein):
    text, done = protein(20), []
    names = names_of(text, 7)
    strategies = ["masked", "masked-joint", "mutant", "wt"]
    found = variants.score(ours, text, names, strategy=strategies, on_batch=done.append)
    assert sum(done) == (7 + 1) * 22
    for strategy, scores in zip(strategies, found, strict=True):
        np.testing.assert_array_equal(scores, variants.score(ours, text, names, strategy=strategy))
    scans_cost = tokens_computed(lambda note: variants.scan(ours, text, strategy=strategies, on_batch=note))
    assert scans_cost == (20 + 1) * 22
    stop = f"{text[8]}9*"  # the wild type's pass serves both
    assert tokens_computed(
        lambda note: variants.score(ours, text, [names[0], stop], strategy="pllr", on_batch=note)
    ) == (2 * 22)
    # Of many proteins, batches hold as many as they have room for, and the one that is there twice is computed once.
    texts, done = [protein(10, seed=i) for i in (1, 2, 3, 1)], []
    asked = [Asked(Job(t, "wt"), [bind(parse(f"{t[2]}3W"), t)]) for t in texts]
    together = scores_of(ours, asked, 100, done.append)
    assert done == [36]
    np.testing.assert_array_equal(np.concatenate(together), [variants.score(ours, t, [f"{t[2]}3W"])[0] for t in texts])


def test_what_is_known_is_bounded_and_right(monkeypatch):
    from esm_fast.variants.plan import Known

    monkeypatch.setattr(Known, "ROWS", 5)
    known, rows = Known(), np.arange(2)
    for i in range(4):
        known.put(bytes([i]), rows, np.full((2, 33), i, float))
    assert known.get(bytes([0]), rows) is None and known.get(bytes([1]), rows) is None and len(known) == 2
    assert (known.get(bytes([3]), np.array([1])) == 3).all() and known.get(bytes([3]), np.array([0, 2])) is None
    known.put(bytes([3]), np.arange(9), np.zeros((9, 33)))  # more than there is room for: it alone
    assert len(known) == 1 and known.get(bytes([3]), np.arange(9)).shape == (9, 33)


def test_a_long_protein_shares_its_windows(ours, protein):
    text = protein(1040)
    assert Job(text, "masked").rows_plan(ours, masked=True).tokens == 1040 * 1024
    assert tokens_computed(lambda note: variants.scan(ours, text, on_batch=note)) == 2 * 1024
    assert Job(text, "wt", "optimal").rows_plan(ours, masked=False).tokens == (1042 - 1024 + 1) * 1024


@pytest.mark.parametrize("strategy", ["wt", "masked", "pllr"])
def test_proteins_scanned_together_are_as_alone(model, protein, strategy):
    texts = [protein(length, seed=length) for length in (5, 1, 17, 9)]
    together = list(scans(model, texts, strategy, "auto", 40))
    for text, found in zip(texts, together, strict=True):
        np.testing.assert_array_equal(found, variants.scan(model, text, strategy=strategy))


def test_half_precision_keeps_the_head_in_float32(fair_checkpoint, protein):
    """Logits in bfloat16 would be rounded to 8 bits: scores on a coarse grid."""
    half = esm_fast.load(fair_checkpoint, dtype="bfloat16")[0]
    found = variants.scan(half, protein(30))
    exact = variants.scan(esm_fast.load(fair_checkpoint)[0], protein(30))
    grid = torch.from_numpy(found).to(torch.bfloat16).double().numpy()
    assert (found != grid).mean() > 0.5
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
