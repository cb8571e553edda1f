"""Long proteins: the published windows, their weights, and what goes wrong with any other."""

import numpy as np
import pytest
import variant_formulas as formulas

import esm_fast
from esm_fast import variants
from esm_fast.variants import windows
from esm_fast.variants.windows import rule

STANDARD = "ACDEFGHIKLMNPQRSTVWY"
CLOSE = dict(rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "residues, count", [(1023, 2), (1531, 2), (1532, 3), (2000, 3), (2042, 3), (2044, 4), (5000, 9), (34350, 67)]
)
def test_as_many_windows_as_brandes_and_at_the_same_places(residues, count):
    views = rule("brandes", residues, 1022)
    spans = sorted({view.span for at in range(residues) for view in views(at)})
    assert len(spans) == count
    assert [(span.start - 1, span.end - 1) for span in spans] == formulas.brandes_parts(residues)
    assert all(span.wrapped for span in spans)


@pytest.mark.parametrize("residues", [1023, 1100, 1531, 1532, 2043, 3001])
def test_weights_of_brandes(residues):
    views = rule("brandes", residues, 1022)
    parts, shares = formulas.brandes_weights(residues)
    for at in range(residues):
        expected = {start: share for (start, _), share in zip(parts, shares[:, at], strict=True) if share}
        found = {view.span.start - 1: view.weight for view in views(at)}
        assert found == pytest.approx(expected) and sum(found.values()) == pytest.approx(1)
        assert all(view.row == at - view.span.start + 2 for view in views(at))


@pytest.mark.parametrize("residues", [1023, 1533, 1534, 2044, 2600])
@pytest.mark.parametrize("name", windows.WINDOWS)
def test_every_view_shows_its_residue(name, residues):
    if name in ("error", "whole"):
        with pytest.raises(ValueError, match=f"the protein has {residues} residues"):
            rule(name, residues, 1022)
        return
    views = rule(name, residues, 1022)
    for at in range(residues):
        for view in views(at):
            first = view.span.start - view.span.wrapped  # the token that row 0 is
            assert first + view.row == at + 1
            assert view.span.end - view.span.start + 2 * view.span.wrapped == 1024
            assert view.span.start >= 0 and view.span.end <= residues + 2


@pytest.mark.parametrize("name", ["optimal", "brandes", "proteingym", "error"])
def test_a_protein_that_fits_is_seen_whole(name):
    views = rule(name, 1022, 1022)
    assert views(0) == [((0, 1024, False), 1, 1.0)] and views(1021) == [((0, 1024, False), 1022, 1.0)]
    assert rule(name, 1022, None)(5) == views(5)


def test_a_model_without_a_limit_takes_a_protein_whole_on_request():
    assert rule("whole", 5000, None)(7) == [((0, 5002, False), 8, 1.0)]
    assert len(rule("brandes", 5000, None)(2500)) > 1  # the published windows all the same


def test_a_model_for_less_has_smaller_windows():
    views = rule("brandes", 200, 62)
    assert all(view.span.end - view.span.start == 62 for at in range(200) for view in views(at))
    assert all(view.span.end - view.span.start == 64 for at in range(200) for view in rule("optimal", 200, 62)(at))


@pytest.fixture(scope="module")
def long(pair, protein):
    fair, ours = pair
    return fair, ours, protein(1533, seed=4)


def ratios(rows, fair, text):
    columns = [formulas.index(fair, residue) for residue in STANDARD]
    own = rows[np.arange(len(text)), [formulas.index(fair, residue) for residue in text]]
    return rows[:, columns] - own[:, None]


def test_brandes_over_a_long_protein(long):
    fair, ours, text = long
    expected = ratios(formulas.brandes_rows(fair, text), fair, text)
    np.testing.assert_allclose(variants.scan(ours, text), expected, **CLOSE)  # auto: what wt was published with
    picks = [0, 3, 255, 256, 510, 511, 512, 700, 1021, 1022, 1277, 1532]
    names = [f"{text[i]}{i + 1}{'A' if text[i] != 'A' else 'C'}" for i in picks]
    found = variants.score(ours, text, names, window="brandes")
    np.testing.assert_allclose(
        found, [expected[i, STANDARD.index(n[-1])] for i, n in zip(picks, names, strict=True)], **CLOSE
    )


def test_proteingym_over_a_long_protein(long):
    fair, ours, text = long
    expected = ratios(formulas.proteingym_rows(fair, text)[1:-1], fair, text)
    np.testing.assert_allclose(variants.scan(ours, text, window="proteingym"), expected, **CLOSE)
    assert np.abs(expected - variants.scan(ours, text, window="brandes")).max() > 1e-3


def test_masked_positions_over_a_long_protein(long):
    fair, ours, text = long
    picks = [0, 510, 511, 512, 700, 1020, 1022, 1023, 1532]
    mutations = [(text[i], i + 1, "A" if text[i] != "A" else "C") for i in picks]
    names = ["".join(map(str, mutation)) for mutation in mutations]
    expected = [formulas.masked_optimal(fair, text, mutation) for mutation in mutations]
    np.testing.assert_allclose(variants.score(ours, text, names, strategy="masked"), expected, **CLOSE)
    together = mutations[1], mutations[4], mutations[8]
    joint = sum(
        formulas.masked_optimal(fair, text, m, masks=[position for _, position, _ in together]) for m in together
    )
    name = ":".join("".join(map(str, mutation)) for mutation in together)
    np.testing.assert_allclose(variants.score(ours, text, [name], strategy="masked-joint"), [joint], **CLOSE)


def test_masked_positions_under_the_averaging_windows(long):
    """Not published together; each view of the position has the mask."""
    fair, ours, text = long
    at = 700
    mutation = (text[at], at + 1, "A" if text[at] != "A" else "C")
    parts, shares = formulas.brandes_weights(len(text))
    expected = 0.0
    for (start, end), share in zip(parts, shares[:, at], strict=True):
        if start <= at < end:
            tokens = formulas.tokens_of(fair, text[start:end])
            tokens[0, at - start + 1] = formulas.MASK
            expected += share * formulas.ratio(fair, formulas.lp(fair, tokens), mutation, at - start + 1)
    name = "".join(map(str, mutation))
    found = variants.score(ours, text, [name], strategy="masked", window="brandes")
    np.testing.assert_allclose(found, [expected], **CLOSE)
    with pytest.raises(ValueError, match="no masked marginals over overlapping"):
        variants.score(ours, text, [name], strategy="masked", window="proteingym", compat=True)


@pytest.mark.parametrize("first, change", [(1, "del"), (40, "insWW"), (700, "del"), (1100, "delinsWWW"), (1533, "del")])
def test_likelihood_ratios_of_long_proteins_are_of_the_published_parts(long, first, change):
    fair, ours, text = long
    i = first - 1
    if change == "insWW":
        name, changed = f"{text[i - 1]}{first - 1}_{text[i]}{first}insWW", text[:i] + "WW" + text[i:]
    else:
        name, changed = (
            f"{text[i]}{first}{change}",
            text[:i] + change.removeprefix("delins" if "ins" in change else "del") + text[i + 1 :],
        )
    wild_type, mutant = formulas.cropped(text, changed, first)
    expected = formulas.likelihood(fair, mutant) - formulas.likelihood(fair, wild_type)
    np.testing.assert_allclose(variants.score(ours, text, [name], strategy="pllr"), [expected], atol=5e-4)


def test_changes_too_far_apart_for_one_part_are_refused(long):
    _, ours, text = long
    name = f"{text[0]}1del:{text[-1]}1533del"
    with pytest.raises(ValueError, match="row 1: .* farther apart than one window"):
        variants.score(ours, text, [name], strategy="pllr")
    assert np.isnan(variants.score(ours, text, [name], strategy="pllr", invalid="nan")).all()


def test_a_stop_of_a_long_protein_looks_at_all_that_is_behind_it(long):
    fair, ours, text = long
    expected = ratios(formulas.brandes_rows(fair, text), fair, text)[1200:].min()
    np.testing.assert_allclose(variants.score(ours, text, [f"{text[1199]}1200*"], strategy="pllr"), [expected], **CLOSE)


def test_error_refuses_a_long_protein(ours, protein):
    with pytest.raises(ValueError, match="1023 residues and the limit is 1022"):
        variants.score(ours, protein(1023), ["="], window="error")
    with pytest.raises(ValueError, match="window is 'half'; choose one of auto, optimal"):
        variants.score(ours, protein(30), ["="], window="half")


def test_titin_in_bounded_memory(protein, tmp_path):
    """34,350 residues, 67 windows, in a process of its own, whose memory can be told."""
    import subprocess
    import sys

    from fakes import fair_esm_model, save_fair_esm

    path = save_fair_esm(fair_esm_model(seed=3, layers=1, heads=1, head_dim=8, ffn=8), tmp_path / "one.pt")
    text = protein(34350, seed=9)
    (tmp_path / "titin.txt").write_text(text)
    program = """
import resource, sys
import numpy as np
import esm_fast
from esm_fast import variants
model, text = esm_fast.load(sys.argv[1])[0], open(sys.argv[2]).read()
variants.scan(model, text[:1100])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = variants.scan(model, text)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
np.save(sys.argv[3], found)
"""
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "titin.txt"), str(tmp_path / "out.npy")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 150_000  # kB; the scores are 5 MB
    found, model = np.load(tmp_path / "out.npy"), esm_fast.load(path)[0]
    assert found.shape == (34350, 20) and np.isfinite(found).all()
    part = variants.scan(model, text[:1022])  # the first window alone, where no other covers it
    np.testing.assert_allclose(found[:500], part[:500], atol=1e-6)
