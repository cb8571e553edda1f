"""TEM-1: all 4,996 measured mutants through the command; the published scores where real weights are at hand."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest

import esm_fast
from esm_fast import hub, variants
from esm_fast.cli import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODELS = [f"esm1v_t33_650M_UR90S_{i}" for i in range(1, 6)]


@pytest.fixture(scope="module")
def table():
    with gzip.open(EXAMPLES / "tem1_esm1v_scores.csv.gz", "rt") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tem1():
    return "".join((EXAMPLES / "tem1.fasta").read_text().split("\n")[1:])


def spearman(a, b) -> float:
    def ranks(values):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def test_all_mutants_through_the_command(table, tem1, tmp_path, capsys):
    arguments = [str(EXAMPLES / "tem1.fasta"), "-o", str(tmp_path / "o.csv"), "--dtype", "float32", "--variants"]
    assert main(["variants", *arguments, str(EXAMPLES / "tem1_esm1v_scores.csv.gz")]) == 0
    assert "rows      4,996 in" in capsys.readouterr().out
    with (tmp_path / "o.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{k: v for k, v in row.items() if k != "esm1b_t6_demo"} for row in rows] == table
    scores = np.array([float(row["esm1b_t6_demo"]) for row in rows])
    scan = variants.scan(esm_fast.load("esm1b_t6_demo")[0], tem1)
    expected = [scan[int(row["mutant"][1:-1]) - 1, "ACDEFGHIKLMNPQRSTVWY".index(row["mutant"][-1])] for row in table]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    # What docs/variants.md says that the small model's scores are worth.
    assert 0.03 < spearman(scores, [float(row["effect_2500"]) for row in table]) < 0.12


def test_the_published_scores_have_the_published_correlations(table):
    """Of the file itself: rows and columns are those that the documentation quotes."""
    effect = [float(row["effect_2500"]) for row in table]
    published = np.array([[float(row[f"esm1v_{i}"]) for row in table] for i in range(1, 6)])
    found = [round(spearman(scores, effect), 3) for scores in published]
    assert found == [0.662, 0.663, 0.645, 0.686, 0.706]
    assert round(spearman(published.mean(axis=0), effect), 3) == 0.703


@pytest.mark.weights
@pytest.mark.parametrize("number", range(1, 6))
def test_published_esm1v_scores(table, tem1, number):
    """wt-marginals of the mature protein, as fair-esm's example has them."""
    name = MODELS[number - 1]
    if not _cached(name):
        pytest.skip(f"{name} is in no cache: the published scores of TEM-1 were not compared")
    found = variants.score(name, tem1[23:], [row["mutant"] for row in table], offset=23)
    np.testing.assert_allclose(found, [float(row[f"esm1v_{number}"]) for row in table], atol=2e-3)


@pytest.mark.weights
def test_published_esm1b_scores():
    """Of esm-variants' example protein."""
    name, text = "esm1b_t33_650M_UR50S", "FISHWISHFQRCHIPSTHATARECRISP"
    if not _cached(name):
        pytest.skip(f"{name} is in no cache: the published scores of Brandes et al. were not compared")
    model = esm_fast.load(name)[0]
    np.testing.assert_allclose(
        variants.score(model, text, ["F1K", "F1R", "F1H"]), [-3.2310808, -2.872289, -3.4361703], atol=1e-3
    )
    found = variants.score(model, text, ["I14_S16delinsEESE"], strategy="pllr")
    np.testing.assert_allclose(found, [-1.0078125], atol=5e-3)
    found = variants.score(model, "MARGTYNMGKHFDA", ["A2_R3del"], strategy="pllr")
    np.testing.assert_allclose(found, [1.0056415], atol=5e-3)


def _cached(name: str) -> bool:
    return hub.cached(name) is not None
