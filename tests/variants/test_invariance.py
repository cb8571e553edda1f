"""Bits that depend on nothing but the variant, and work that is done once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import esm_fast
from esm_fast import _C, variants
from esm_fast.variants.scores import Job, scans
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
def test_plans_that_are_cut_into_parts_do_not_change_a_bit(model, protein, strategy, monkeypatch):
    text = protein(23)
    names = [*names_of(text, 9), "="]
    whole = variants.score(model, text, names, strategy=strategy)
    monkeypatch.setattr("esm_fast.variants.scores._PLAN_TOKENS", 60)
    np.testing.assert_array_equal(variants.score(model, text, names, strategy=strategy), whole)


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
