"""esm_fast.sklearn: a transformer as scikit-learn's own are, whose rows are `embed`'s."""

import pickle
import sqlite3

import numpy as np
import pytest

import esm_fast

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from esm_fast.sklearn import EsmEmbedder, best_layer, embedder, rows

RNG = np.random.default_rng(0)
SEQUENCES = ["".join(RNG.choice(list("ACDEFGHIKLMNPQRSTVWY"), length)) for length in RNG.integers(5, 30, 30)]
LABELS = np.array([10 * (text.count("A") - text.count("K")) / len(text) for text in SEQUENCES])


@pytest.fixture
def counted(monkeypatch):
    """Sequences computed, in order; nothing is kept from other tests."""
    seen = []
    monkeypatch.setattr(embedder, "KEPT", rows._Kept(2**20))

    def counting(model, sequences, **settings):
        seen.extend(text for _, text in sequences)
        return esm_fast.embed(model, sequences, **settings)

    monkeypatch.setattr(embedder, "embed", counting)
    return seen


def embedded(sequences, **settings):
    model, _ = esm_fast.load("esm1b_t6_demo", packed="auto")
    found = [arrays for _, arrays in esm_fast.embed(model, sequences, **settings)]
    return [np.stack([arrays[layer] for arrays in found]) for layer in settings["layers"]]


def test_rows_are_those_of_embed_in_the_order_of_the_layers(counted):
    made = EsmEmbedder(layers=(-1, 2), pool="max").fit(SEQUENCES)
    features = made.transform(np.array(SEQUENCES, dtype=object)[:, None])
    np.testing.assert_array_equal(features, np.hstack(embedded(SEQUENCES, layers=(6, 2), pool="max")))
    names = made.get_feature_names_out()
    assert features.shape == (len(SEQUENCES), len(names)) and features.dtype == np.float32
    assert (names[0], names[-1]) == ("layer6_0000", "layer2_0191")


def test_each_sequence_is_computed_once_in_a_search(counted):
    steps = make_pipeline(EsmEmbedder(), Ridge())
    search = GridSearchCV(steps, {"ridge__alpha": [0.1, 10.0]}, cv=3).fit(SEQUENCES, LABELS)
    search.predict(SEQUENCES[::-1])
    assert sorted(counted) == sorted(set(SEQUENCES))
    search.set_params(estimator__esmembedder__layers=3).fit(SEQUENCES, LABELS)
    assert len(counted) == 2 * len(set(SEQUENCES))  # another layer, other rows


def test_clones_and_pickles_hold_parameters_only(counted):
    fitted = EsmEmbedder(pool="std").fit(SEQUENCES)
    assert clone(fitted).get_params() == fitted.get_params()
    text = pickle.dumps(fitted)
    assert len(text) < 1000
    np.testing.assert_array_equal(pickle.loads(text).transform(SEQUENCES[:3]), fitted.transform(SEQUENCES[:3]))


def test_rows_on_disk_are_used_unless_damaged(counted, tmp_path, monkeypatch):
    def transform():
        monkeypatch.setattr(embedder, "KEPT", rows._Kept(2**20))  # as in a new process
        return EsmEmbedder(cache=tmp_path / "rows.sqlite").fit(SEQUENCES).transform(SEQUENCES)

    first = transform()
    counted.clear()
    np.testing.assert_array_equal(transform(), first)
    assert not counted
    with sqlite3.connect(tmp_path / "rows.sqlite") as connection:
        connection.execute("UPDATE rows SET row = zeroblob(768) WHERE key = (SELECT min(key) FROM rows)")
    connection.close()
    np.testing.assert_array_equal(transform(), first)
    assert len(counted) == 1


def test_memory_keeps_what_was_used_last():
    kept = rows._Kept(2 * 8)
    for key in (b"a", b"b", b"a", b"c"):
        kept.keep({key: np.zeros(1)})
    assert set(kept.find([b"a", b"b", b"c"])) == {b"a", b"c"}


@pytest.mark.parametrize(
    ("parameters", "X", "message"),
    [
        ({}, "MKV", "one string"),
        ({}, ["MKV", float("nan")], "row 1"),
        ({}, np.array([["MKV", "x"]]), "2 columns"),
        ({"pool": "per_residue"}, ["MKV"], "pool"),
        ({"unknown": "skip"}, ["MKV"], "keeps its row"),
        ({"layers": (6, -1)}, ["MKV"], "once"),
        ({"layers": 7}, ["MKV"], "layer 7"),
        ({}, ["MKV", "MK1"], r"X\[1\]"),
    ],
)
def test_what_cannot_be_is_named(parameters, X, message):
    with pytest.raises((TypeError, ValueError), match=message):
        EsmEmbedder(**parameters).fit(X).transform(X)


def test_the_best_layer_is_found_and_saved(tmp_path):
    """Composition is best read from the embedding itself; the file without the layers above gives the same rows."""
    found = best_layer("esm1b_t6_demo", SEQUENCES, LABELS, layers=(0, 4, -1), cv=3)
    assert found.layers == [0, 4, 6] and found.layer == 0 == found.layers[found.scores.argmax()]
    assert found.nested.shape == (3,) and set(found.chosen) <= {0, 4, 6}
    found.save(tmp_path / "cut.safetensors")
    model, _ = esm_fast.load(tmp_path / "cut.safetensors")
    assert model.config.layers == 1
    ((_, rows),) = esm_fast.embed(model, SEQUENCES[:1], layers=(0,))
    np.testing.assert_array_equal(rows[0], embedded(SEQUENCES[:1], layers=(0,))[0][0])
    assert abs(found.estimator.predict(rows[0][None])[0] - LABELS[0]) < 1  # fitted to these very rows


def test_classes_are_compared_by_accuracy():
    found = best_layer("esm1b_t6_demo", SEQUENCES, LABELS > 0, layers=(0, 6), cv=3)
    assert 0.5 < found.scores.max() <= 1 and set(found.estimator.classes_) == {False, True}


def test_labels_must_be_as_many():
    with pytest.raises(ValueError, match="30 sequences and 29 labels"):
        best_layer("esm1b_t6_demo", SEQUENCES, LABELS[1:])
