"""Logistic regression with softmax over all classes, by L-BFGS (scikit-learn), its penalty by the loss held out."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .parts import Part, moments

PENALTIES = 10.0 ** np.arange(0, -6.5, -1)  # from the strongest, in units of the number of rows
_PATIENCE = 2  # weaker penalties without a lower loss before the others are left
_FOLDS = 5


class Logistic:
    """Of a part's rows, standardised, for one penalty after another, each beginning where the last one ended."""

    def __init__(self, part: Part, balanced: bool):
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            raise ImportError("classes need scikit-learn: pip install 'esm_fast[sklearn]'") from None
        self.mean, self.spread = moments(part.rows)
        self.rows = ((part.rows - self.mean) / self.spread).astype(np.float32)
        self.wanted = part.wanted.astype(np.int64)
        weighing = "balanced" if balanced else None
        self.model = LogisticRegression(max_iter=300, tol=1e-4, warm_start=True, class_weight=weighing)

    def head(self, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """float64 (classes, width) and (classes,), for rows that are not standardised."""
        self.model.set_params(C=1 / (penalty * len(self.rows)))
        with _unconverged():
            self.model.fit(self.rows, self.wanted)
        weight, bias = self.model.coef_.astype(np.float64), self.model.intercept_.astype(np.float64)
        if len(weight) == 1:  # two classes: the second's logit, the first's being 0
            weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
        weight = weight / self.spread
        return weight, bias - weight @ self.mean


def choose(train: Part, valid: Part, classes: int, class_weight, *, balanced: bool, left_out: bool):
    """(the penalty, its head (weight, bias), the sum of its losses on rows that it did not see, how many these are).

    left_out: the rows of training count too, as said by heads of four fifths of the others.
    """
    judged = [(Logistic(train, balanced), valid)]
    for inner, outer in _folds(train, classes) if left_out or not len(valid.wanted) else ():
        judged.append((Logistic(inner, balanced), outer))
    best, worse, count = None, 0, sum(len(part.wanted) for _, part in judged)
    for penalty in PENALTIES.tolist():
        heads = [solver.head(penalty) for solver, _ in judged]
        loss = sum(_loss(head, part, class_weight) for head, (_, part) in zip(heads, judged, strict=True))
        if best is None or loss < best[2]:
            best, worse = (penalty, heads[0], loss), 0
        else:
            worse += 1
        if worse > _PATIENCE:
            break
    return (*best, count)


def _loss(head: tuple[np.ndarray, np.ndarray], part: Part, class_weight) -> float:
    weight, bias = (torch.from_numpy(x.astype(np.float32)) for x in head)
    said, wanted = torch.from_numpy(part.rows) @ weight.T + bias, torch.from_numpy(part.wanted.astype(np.int64))
    return float(torch.nn.functional.cross_entropy(said, wanted, weight=class_weight, reduction="sum"))


def _folds(part: Part, classes: int) -> Iterator[tuple[Part, Part]]:
    """(what trains, what is said of), each class dealt out evenly; a row alone in its class always trains."""
    wanted = part.wanted.astype(np.int64)
    order = np.lexsort((np.random.default_rng(0).random(len(wanted)), wanted))
    fold = np.empty(len(wanted), np.int64)
    fold[order] = np.arange(len(wanted)) % _FOLDS
    fold[np.bincount(wanted, minlength=classes)[wanted] < 2] = -1
    for number in range(_FOLDS):
        held = fold == number
        if held.any():
            yield Part(part.rows[~held], part.wanted[~held]), Part(part.rows[held], part.wanted[held])


@contextmanager
def _unconverged() -> Iterator[None]:
    """A weak penalty may need more steps than it gets; the held-out loss judges what it has come to."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
