"""Each strategy gives what the published formula gives, written plainly over fair-esm's own model."""

import random

import numpy as np
import pytest
import variant_formulas as formulas

from esm_fast import variants

STANDARD = "ACDEFGHIKLMNPQRSTVWY"
CLOSE = dict(rtol=0, atol=1e-4)


def mutations_of(protein, count, seed):
    """`count` random substitutions of different positions, ascending."""
    choose = random.Random(seed)
    at = sorted(choose.sample(range(len(protein)), count))
    return [(protein[i], i + 1, choose.choice(STANDARD.replace(protein[i], ""))) for i in at]


def text_of(mutations, separator=":"):
    return separator.join(f"{wild_type}{position}{mutant}" for wild_type, position, mutant in mutations)


@pytest.mark.parametrize("strategy", ["wt", "masked", "masked-joint", "mutant"])
def test_sums_of_log_ratios(pair, protein, strategy):
    fair, ours = pair
    text = protein(61)
    sets = [mutations_of(text, count, seed) for seed, count in enumerate([1, 1, 2, 3, 5, 1])]
    sets += [[(text[0], 1, "W" if text[0] != "W" else "A")], [(text[-1], 61, "C" if text[-1] != "C" else "D")]]
    formula = getattr(formulas, strategy.replace("-", "_"))
    expected = [formula(fair, text, mutations) for mutations in sets]
    found = variants.score(ours, text, [text_of(mutations) for mutations in sets], strategy=strategy)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_the_strategies_differ_where_several_positions_change(ours, protein):
    text = protein(40)
    variant = text_of(mutations_of(text, 4, seed=1))
    found = [
        variants.score(ours, text, [variant], strategy=name)[0] for name in ("wt", "masked", "masked-joint", "mutant")
    ]
    assert min(abs(a - b) for i, a in enumerate(found) for b in found[:i]) > 1e-3


def test_pseudo_log_likelihood_of_each_variant_and_of_the_wild_type(pair, protein):
    fair, ours = pair
    text = protein(23)
    changed = mutations_of(text, 2, seed=3)
    found = variants.score(ours, text, ["=", text_of(changed), "p.=", f"{text[4]}5del"], strategy="pll")
    expected = [formulas.pll(fair, t) for t in (text, formulas.mutated(text, changed), text, text[:4] + text[5:])]
    np.testing.assert_allclose(found, expected, **CLOSE)
    perplexities = variants.pseudo_perplexity(ours, [text, text[:9]])
    likelihoods = np.array([formulas.pll(fair, text) / 23, formulas.pll(fair, text[:9]) / 9])
    np.testing.assert_allclose(perplexities, np.exp(-likelihoods), rtol=1e-4)


def test_compat_is_the_published_error_and_only_on_request(pair, protein):
    fair, ours = pair
    text = protein(19)
    changed = mutations_of(text, 1, seed=5)
    wrong = formulas.pll_off_by_one(fair, formulas.mutated(text, changed))
    found = variants.score(ours, text, [text_of(changed)], strategy="pseudo-ppl", compat=True)
    np.testing.assert_allclose(found, [wrong], **CLOSE)
    right = variants.score(ours, text, [text_of(changed)], strategy="pseudo-ppl")
    assert abs(right[0] - wrong) > 1e-2


@pytest.mark.parametrize(
    "change, sequence",
    [
        ("p.{5}5del", lambda s: s[:4] + s[5:]),
        ("p.{3}3_{6}6del", lambda s: s[:2] + s[6:]),
        ("p.{5}5_{6}6insWCW", lambda s: s[:5] + "WCW" + s[5:]),
        ("p.{5}5_{7}7delinsWC", lambda s: s[:4] + "WC" + s[7:]),
        ("p.{5}5dup", lambda s: s[:5] + s[4] + s[5:]),
        ("p.{5}5_{7}7dup", lambda s: s[:7] + s[4:7] + s[7:]),
        ("{1}1del", lambda s: s[1:]),
        ("{9}9_{12}12delinsY:{20}20W", lambda s: s[:8] + "Y" + s[12:19] + "W" + s[20:]),
    ],
)
def test_likelihood_ratios_take_insertions_and_deletions(pair, protein, change, sequence):
    fair, ours = pair
    text = protein(30, seed=2)
    variant = change.format("", *text)
    expected = formulas.likelihood(fair, sequence(text)) - formulas.likelihood(fair, text)
    np.testing.assert_allclose(variants.score(ours, text, [variant], strategy="pllr"), [expected], **CLOSE)


def test_a_stop_has_the_least_ratio_behind_it(pair, protein):
    fair, ours = pair
    text = protein(30)
    rows = formulas.lp(fair, formulas.tokens_of(fair, text)).numpy()[1:-1]
    columns = [formulas.index(fair, residue) for residue in STANDARD]
    own = rows[np.arange(30), [formulas.index(fair, residue) for residue in text]]
    ratios = rows[:, columns] - own[:, None]
    found = variants.score(ours, text, [f"p.{text[16]}17*", f"{text[0]}1Ter".replace("Ter", "*")], strategy="pllr")
    np.testing.assert_allclose(found, [ratios[17:].min(), ratios[1:].min()], **CLOSE)


@pytest.mark.parametrize("strategy", ["wt", "masked", "masked-joint", "mutant"])
def test_a_scan_is_every_single_substitution(ours, protein, strategy):
    text = protein(17)
    found = variants.scan(ours, text, strategy=strategy)
    single = [f"{residue}{i + 1}{new}" for i, residue in enumerate(text) for new in STANDARD]
    assert found.shape == (17, 20)
    np.testing.assert_array_equal(found.ravel(), variants.score(ours, text, single, strategy=strategy))


@pytest.mark.parametrize("strategy", ["pll", "pllr"])
def test_a_scan_of_likelihoods_is_the_difference_from_the_wild_type(ours, protein, strategy):
    text = protein(6)
    found = variants.scan(ours, text, strategy=strategy)
    single = [f"{residue}{i + 1}{new}" for i, residue in enumerate(text) for new in STANDARD]
    scores = variants.score(ours, text, single, strategy=strategy)
    base = variants.score(ours, text, ["="], strategy=strategy)
    np.testing.assert_allclose(found.ravel(), scores - base, atol=1e-9)


def test_log_probs_masked_or_not(pair, protein):
    fair, ours = pair
    text = protein(15)
    tokens = formulas.tokens_of(fair, text)
    np.testing.assert_allclose(variants.log_probs(ours, text), formulas.lp(fair, tokens)[1:-1], **CLOSE)
    tokens[0, [3, 8]] = 32
    np.testing.assert_allclose(variants.log_probs(ours, text, masked=[2, 7]), formulas.lp(fair, tokens)[1:-1], **CLOSE)
    each = variants.log_probs(ours, text, masked=True)
    for i in range(15):
        tokens = formulas.tokens_of(fair, text)
        tokens[0, i + 1] = 32
        np.testing.assert_allclose(each[i], formulas.lp(fair, tokens)[i + 1], **CLOSE)


def test_several_models_have_a_column_each_and_their_mean(fair_checkpoint, ours, protein, tmp_path):
    from fakes import fair_esm_model, save_fair_esm

    other = save_fair_esm(
        fair_esm_model(seed=9, norm_before=False),
        tmp_path / "other.pt",
    )
    text = protein(12)
    names = [f"{text[3]}4A", f"{text[5]}6W"]
    table = variants.score([ours, other, fair_checkpoint], text, names)
    assert table.shape == (2, 4)
    np.testing.assert_array_equal(table[:, 0], variants.score(ours, text, names))
    np.testing.assert_array_equal(table[:, 2], table[:, 0])
    np.testing.assert_allclose(table[:, 3], table[:, :3].mean(axis=1))
    least = variants.score([ours, other], text, names, combine="min")
    np.testing.assert_array_equal(least[:, 2], least[:, :2].min(axis=1))
    assert variants.score([ours, other], text, names, combine="none").shape == (2, 2)
    assert variants.scan([ours, other], text).shape == (12, 20, 3)


def test_rare_residues_in_the_protein_are_scored_against_their_own_token(pair):
    fair, ours = pair
    text = "MKUXBZOAV"
    expected = [formulas.wt(fair, text, [(residue, i + 1, "L")]) for i, residue in enumerate(text)]
    found = variants.score(ours, text, [f"{residue}{i + 1}L" for i, residue in enumerate(text)])
    np.testing.assert_allclose(found, expected, **CLOSE)
