"""The accuracy report, on a toy model: that it measures what it says."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers")


@pytest.fixture
def accuracy():
    import accuracy

    return accuracy


def test_report_of_a_toy_model(accuracy, tmp_path):
    """bf16 lies where bf16 lies, fp32 a thousand times closer: with truth taken for anything else neither would."""
    assert accuracy.main(["--tiny", "--proteins", "2", "--neighbours", "8", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "accuracy.json").read_text())
    errors = {row["arithmetic"]: row["relative error"] for row in written["errors"]}
    assert errors["esm_fast fp32"] < 3e-6 < errors["exact, on bf16 weights"]
    for name in ("torch bf16, fp32 residual", "Hugging Face bf16", "esm_fast bf16"):
        assert 3e-4 < errors[name] < 3e-2
    recalls = {row["arithmetic"]: row["recall@1"] for row in written["neighbours"]}
    assert recalls["esm_fast fp32"] == 1 and all(0 <= value <= 1 for value in recalls.values())
    assert "| esm_fast bf16" in (tmp_path / "accuracy.md").read_text()


def test_report_of_a_trained_model(accuracy, tmp_path):
    arguments = ["--model", "esm1b_t6_demo", "--proteins", "1", "--neighbours", "2", "--cut", "20"]
    assert accuracy.main([*arguments, "--arithmetics", "esm_fast bf16", "--out", str(tmp_path)]) == 0
    errors = {
        row["arithmetic"]: row["relative error"]
        for row in json.loads((tmp_path / "accuracy.json").read_text())["errors"]
    }
    assert errors["esm_fast fp32"] < 3e-6 and 3e-4 < errors["esm_fast bf16"] < 1e-2


def test_exact_is_fp64(accuracy):
    """Against the same model in fp64 from the start: rounding of fp64, not of fp32."""
    from common import TINY
    from peers import our_model
    from random_weights import trained_like_state

    state, proteins = trained_like_state(TINY), [("a", "MKTAYIAKQR"), ("b", "GASLP")]
    wide = our_model(TINY, state, "float64", "reference")
    for rows, (_, arrays) in zip(
        accuracy.exact(TINY, state, proteins), accuracy.embed(wide, proteins, pool="per_residue"), strict=True
    ):
        assert rows.dtype == np.float64
        np.testing.assert_allclose(rows, arrays[-1], rtol=0, atol=1e-12)


def test_errors_and_recall(accuracy):
    truth = np.random.default_rng(0).normal(size=(6, 4))
    exact = accuracy.compare([truth[:2], truth[2:]], [truth[:2], truth[2:]])
    assert exact["relative error"] == exact["largest error"] == 0 and exact["cosine, proteins"] == pytest.approx(1)
    assert accuracy.compare([1.1 * truth], [truth])["relative error"] == pytest.approx(0.1)
    turned = accuracy.compare([np.concatenate([truth[:5], -truth[5:]])], [truth])
    assert turned["cosine, residues"] == pytest.approx(-1)
    assert accuracy.recall(truth, truth) == 1
    points = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]])
    assert accuracy.recall(points[[0, 2, 1, 3]], points) == 0
    assert not accuracy.given_up(2 * points, points).any()
    given_up = accuracy.given_up(points[[0, 2, 1, 3]], points)  # the first finds the third, at a right angle
    assert given_up[0] == pytest.approx(1 / 1.01**0.5)


def test_families_hold_relatives_and_neither_strangers_nor_copies(accuracy):
    """Three proteins mutated from one, a copy of it, and strangers."""
    from families import with_relatives

    generator = np.random.default_rng(0)
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    strangers = [(f"stranger {i}", "".join(generator.choice(letters, 200))) for i in range(30)]
    mother = np.array(list(strangers[0][1]))
    relatives = []
    for i in range(3):
        changed = np.where(generator.random(200) < 0.15, generator.choice(letters, 200), mother)
        relatives.append((f"relative {i}", "".join(changed)))
    chosen = with_relatives([*strangers, *relatives, ("short", "MKT")], 4)
    assert {label for label, _ in chosen} == {"stranger 0", "relative 0", "relative 1", "relative 2"}
    assert with_relatives([*strangers, ("copy", strangers[0][1])], 4) == []
