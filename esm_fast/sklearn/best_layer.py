"""Which layer's embeddings suit a task: all layers pooled in one pass, then compared by cross-validation."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import GridSearchCV, check_cv, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .. import hub, weights
from ..formats.model import prepack_model, why_not
from ..inference.embed import layer_numbers
from ..inference.load import load
from .embedder import EsmEmbedder

_ALPHAS = np.logspace(-1, 5, 13)


@dataclass(frozen=True)
class BestLayer:
    """What `best_layer` found.

    model: its name or path. layer: the best one. layers: those compared. scores: (layers,) the mean score of each over
    the folds, from which the layer was chosen, so the best of them is too good to expect of new data. nested: (folds,)
    what to expect: in each fold the layer was chosen on the rest of the data; chosen: which. estimator: fitted to all
    of the data at the best layer.
    """

    model: str
    layer: int
    layers: list[int]
    scores: np.ndarray
    nested: np.ndarray
    chosen: list[int]
    estimator: object

    def save(self, path: str | Path, *, dtype: str = "float32") -> None:
        """Writes the model without the layers above the best one, prepacked where the CPU kernels will run it.

        Ask the file for this layer by the same number: `embed(model, ..., layers=(layer,))` gives the same rows. One
        layer more is kept, since a model's last representation is normalised and the others are not.
        """
        checkpoint = weights.read(hub.resolve(self.model)).unpacked()
        model = weights.build(checkpoint, dtype=getattr(torch, dtype))
        _cut(model, self.layer + 1)
        if why_not(model) is None:
            prepack_model(model)
        weights.save(model, path)


def best_layer(model, sequences, y, *, layers=None, pool="mean", estimator=None, cv=5, scoring=None, groups=None,
               dtype="float32", device="auto", cache=None) -> BestLayer:  # fmt: skip
    """Finds the layer whose embeddings predict y best, by nested cross-validation (Varma and Simon 2006).

    Args:
        model: a name or path, see `esm_fast.load`.
        sequences, y: proteins, and a label each: floating-point numbers, or else (integers, strings, booleans) classes.
        layers: which to compare; None: all, with the embedding, 0.
        pool, dtype, device, cache: see `EsmEmbedder`.
        estimator: for features to y; None: standardised features into a ridge or logistic regression whose penalty is
            found by cross-validation of its own.
        cv, scoring, groups: as in `sklearn.model_selection.cross_val_score`, for the inner folds as for the outer ones.

    Raises:
        ValueError: for arguments, and sequences and labels that are not equally many.
    """
    loaded, _ = load(model, device=device, dtype=dtype, packed="auto")
    depth = loaded.config.layers
    numbers = layer_numbers(loaded, range(depth + 1) if layers is None else layers)
    del loaded
    y = np.asarray(y)
    if len(y) != len(sequences):
        raise ValueError(f"there are {len(sequences)} sequences and {len(y)} labels")
    embedder = EsmEmbedder(str(model), layers=numbers, pool=pool, dtype=dtype, device=device, cache=cache)
    features = embedder.fit(sequences).transform(sequences).reshape(len(y), len(numbers), -1)
    classes = not np.issubdtype(y.dtype, np.floating)
    estimator = _default(classes) if estimator is None else estimator
    folds = list(check_cv(cv, y, classifier=classes).split(features, y, groups))

    def score(rows, held_out_folds) -> np.ndarray:
        """(layers,): the mean score of each on these rows."""
        return np.array([
            cross_val_score(clone(estimator), features[rows, place], y[rows], cv=held_out_folds, scoring=scoring).mean()
            for place in range(len(numbers))
        ])  # fmt: skip

    everything = np.arange(len(y))
    nested, chosen = [], []
    for train, test in folds:
        inner_groups = None if groups is None else np.asarray(groups)[train]
        inner = list(check_cv(cv, y[train], classifier=classes).split(features[train], y[train], inner_groups))
        place = int(score(train, inner).argmax())
        chosen.append(numbers[place])
        nested.append(cross_val_score(clone(estimator), features[:, place], y, cv=[(train, test)], scoring=scoring)[0])
    scores = score(everything, folds)
    place = int(scores.argmax())
    fitted = clone(estimator).fit(features[:, place], y)
    return BestLayer(str(model), numbers[place], numbers, scores, np.array(nested), chosen, fitted)


def _default(classes: bool):
    logistic = GridSearchCV(LogisticRegression(max_iter=2000), {"C": _ALPHAS[::3] ** -1.0})
    head = logistic if classes else RidgeCV(_ALPHAS)
    return make_pipeline(StandardScaler(), head)


def _cut(model, kept: int) -> None:
    """Leaves the first layers; the contact regression, which is one of all layers' maps, is emptied."""
    if kept >= len(model.layers):
        return
    model.layers = model.layers[:kept]
    model.contact_head = copy.deepcopy(model.contact_head)
    regression = model.contact_head.regression
    regression.weight = torch.nn.Parameter(regression.weight.new_zeros(1, kept * model.config.attention_heads))
    torch.nn.init.zeros_(regression.bias)
