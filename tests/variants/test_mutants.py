"""Errors that this field is known for are planted one by one; the comparison with the formulas has to see each."""

import numpy as np
import pytest
import variant_formulas as formulas

from esm_fast import variants
from esm_fast.alphabet import CLS, EOS, MASK
from esm_fast.variants import plan, windows
from esm_fast.variants.strategies import masked, masked_joint, mutant, pll, wt
from esm_fast.variants.windows import View


@pytest.fixture(scope="module")
def compared(pair, protein):
    """check(): raises AssertionError where a score is not the published one."""
    fair, ours = pair
    short, long = protein(24), protein(1050, seed=4)
    few = [(short[i], i + 1, "W" if short[i] != "W" else "A") for i in (0, 7, 23)]
    names = ["".join(map(str, mutation)) for mutation in few]
    places = (0, 3, 130, 300, 530, 1049)  # 130 is on the ramps of both windows of brandes
    far = [(long[i], i + 1, "W" if long[i] != "W" else "A") for i in places]
    expected = {name: getattr(formulas, name.replace("-", "_"))(fair, short, few) for name in STRATEGIES}
    expected["pll"] = formulas.pll(fair, formulas.mutated(short, few))
    rows, overlapping = formulas.brandes_rows(fair, long), formulas.proteingym_rows(fair, long)
    ratio = {
        "brandes": [formulas.ratio(fair, rows, m, m[1] - 1) for m in far],
        "proteingym": [formulas.ratio(fair, overlapping, m) for m in far],
        "optimal": [formulas.masked_optimal(fair, long, m) for m in far],
    }

    def check():
        close = dict(rtol=0, atol=1e-4)
        for strategy, value in expected.items():
            np.testing.assert_allclose(
                variants.score(ours, short, [":".join(names)], strategy=strategy), [value], **close
            )
        for window, values in ratio.items():
            texts, how = ["".join(map(str, m)) for m in far], "masked" if window == "optimal" else "wt"
            found = variants.score(ours, long, texts, strategy=how, window=window)
            np.testing.assert_allclose(found, values, **close)

    return check


STRATEGIES = ("wt", "masked", "masked-joint", "mutant")


def edited_context(change):
    true = plan.Protein.context

    def context(self, span, masks=()):
        return bytes(change(bytearray(true(self, span, masks))))

    return context


def with_views(change):
    """Every rule's views changed."""
    true = windows.rule

    def rule(name, residues, longest):
        views = true(name, residues, longest)
        return lambda at: change(views, at, residues)

    return rule


def moved_window(views, at, residues):
    """One token farther along the protein, where there is room."""
    return [
        View(v.span._replace(start=v.span.start + 1, end=v.span.end + 1), v.row - 1, v.weight)
        if v.span.end < residues + 1 and v.row > 1
        else v
        for v in views(at)
    ]


def adds(offset=0, mask=True, others=True, text=None):
    """A masked-joint or mutant strategy that goes wrong."""

    def add(sums, item, bound, proteins):
        protein = proteins.wild_type if text is None else proteins(text(bound, proteins))
        for at, residue in bound.substitutions.items():
            masks = (tuple(bound.substitutions) if others else (at,)) if mask else ()
            sums.add(item, protein, masks, max(0, at - offset), residue, proteins.wild_type.text[at])

    return add


def mutated(bound, proteins):
    return bound.sequence(proteins.wild_type.text)


def flat(monkeypatch, first_and_last):
    """brandes with windows that all are as the inner ones, or as the outer ones."""
    true = windows._weighted

    def weighted(starts, weights, place, size):
        inner = np.minimum(weights[0], weights[-1])
        return true(starts, [inner if first_and_last else np.ones(size)] * len(starts), place, size)

    monkeypatch.setattr(windows, "_weighted", weighted)


MUTANTS = {
    "the row before": lambda m: m.setattr("esm_fast.variants.scores.rule", with_views(
        lambda views, at, n: [v._replace(row=v.row - 1) for v in views(at)])),
    "the row behind": lambda m: m.setattr("esm_fast.variants.scores.rule", with_views(
        lambda views, at, n: [v._replace(row=v.row + 1) for v in views(at)])),
    "<cls> forgotten": lambda m: m.setattr(plan.Protein, "context", edited_context(
        lambda ids: ids[1:] + bytes([EOS]) if ids[0] == CLS else ids)),
    "<eos> forgotten": lambda m: m.setattr(plan.Protein, "context", edited_context(
        lambda ids: ids[:-1] if ids[-1] == EOS else ids)),
    "<cls> put before inner windows": lambda m: m.setattr(plan.Protein, "context", edited_context(
        lambda ids: ids if ids[0] == CLS else bytes([CLS]) + ids[1:])),
    "mask left out": lambda m: m.setattr(plan.Protein, "context", edited_context(
        lambda ids: ids.replace(bytes([MASK]), b"\x05"))),
    "mask one too far": lambda m: m.setattr(plan.Protein, "context", (lambda true: lambda self, span, masks=(): true(
        self, span, tuple(at + 1 for at in masks)))(plan.Protein.context)),
    "window shifted": lambda m: m.setattr("esm_fast.variants.scores.rule", with_views(moved_window)),
    "ends tapered": lambda m: flat(m, True),
    "nothing tapered": lambda m: flat(m, False),
    "weights not normalised": lambda m: m.setattr("esm_fast.variants.scores.rule", with_views(
        lambda views, at, n: [v._replace(weight=1.0) for v in views(at)])),
    "the first window alone": lambda m: m.setattr("esm_fast.variants.scores.rule", with_views(
        lambda views, at, n: [views(at)[0]._replace(weight=1.0)])),
    "masked is joint": lambda m: m.setattr(masked, "add", masked_joint.add),
    "joint is one by one": lambda m: m.setattr(masked_joint, "add", masked.add),
    "mutant in the wild type": lambda m: m.setattr(mutant, "add", masked.add),
    "mutant not masked": lambda m: m.setattr(mutant, "add", adds(mask=False, text=mutated)),
    "mutant masks all": lambda m: m.setattr(mutant, "add", adds(text=mutated)),
    "wt of the residue before": lambda m: m.setattr(wt, "add", adds(offset=1, mask=False)),
    "the published off by one": lambda m: m.setattr(pll, "add", pll.add_compat),
    "pll not masked": lambda m: m.setattr(pll, "add", lambda sums, item, bound, proteins: [
        sums.add(item, proteins(mutated(bound, proteins)), (), at, residue)
        for at, residue in enumerate(mutated(bound, proteins))]),
    "softmax over residues only": lambda m: m.setattr("esm_fast.variants.compute.torch.log_softmax", (
        lambda true: lambda logits, dim: true(logits[:, 4:24], dim).new_zeros(len(logits), 33).index_copy(
            1, __import__("torch").arange(4, 24), true(logits[:, 4:24], dim)))(__import__("torch").log_softmax)),
    "positions from 1": lambda m: m.setattr("esm_fast.variants.compute.PAD", 0),
}  # fmt: skip


def test_nothing_is_wrong_as_it_is(compared):
    compared()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_error_is_seen(compared, name, monkeypatch):
    MUTANTS[name](monkeypatch)
    with pytest.raises(AssertionError):
        compared()
