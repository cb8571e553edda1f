"""The best linear head on features that do not change, solved instead of descended to.

Features are standardised. For numbers it is ridge regression, of one eigenvalue decomposition for all penalties; for
classes, logistic regression by L-BFGS (scikit-learn). The penalty is the one whose loss on held-out examples is lowest;
of ridge regression each training row counts too, as held out from all others, for a small validation part tells little.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from .targets import Target, Targets

# Penalties, from the strongest, in units of the number of rows.
_PENALTIES = 10.0 ** np.arange(2, -6.5, -0.5)
_LOGISTIC_PENALTIES = 10.0 ** np.arange(0, -6.5, -1)
_PATIENCE = 2  # weaker penalties without a lower loss before the others are left
_ROWS = 1 << 14  # converted to float64 at a time


@dataclass(frozen=True)
class Solved:
    """weight: float64 (outputs, width); bias: (outputs,); loss: held out, a label; penalties: one a column."""

    weight: np.ndarray
    bias: np.ndarray
    loss: float
    penalties: tuple[float, ...]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return (rows @ self.weight.T.astype(np.float32) + self.bias.astype(np.float32)).astype(np.float32)


@dataclass(frozen=True)
class Part:
    """rows: float32 (n, width); wanted: (n, columns), see `Targets`."""

    rows: np.ndarray
    wanted: np.ndarray


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread of each column, float64; a spread of 0 is given as 1."""
    mean = rows.mean(axis=0, dtype=np.float64)
    square = sum((np.square(block - mean).sum(axis=0) for block in _blocks(rows)), np.zeros_like(mean))
    spread = np.sqrt(square / len(rows))
    return mean, np.where(spread > 1e-12 * (1 + np.abs(mean)), spread, 1.0)


def solve(targets: Targets, train: Part, valid: Part, *, balanced: bool = False) -> Solved:
    """balanced: every class weighs alike in the loss of training and in that of validation."""
    mean, spread = moments(train.rows)
    weights, biases, losses, penalties = [], [], [], []
    class_weights = targets.class_weights(train.wanted, balanced)
    for number, column in enumerate(targets.columns):
        parts = [_known(part, number) for part in (train, valid)]
        path = _classes(column, *parts, mean, spread, balanced) if column.classes else _numbers(parts[0], mean, spread)
        weight, bias, loss, penalty = _best(path, column, parts[1], class_weights[number])
        weights.append(weight / spread)
        biases.append(bias - (weight / spread) @ mean)
        losses.append(loss)
        penalties.append(penalty)
    return Solved(np.concatenate(weights), np.concatenate(biases), _mean(losses), tuple(penalties))


def _mean(losses: list[tuple[float, int]]) -> float:
    return sum(total for total, _ in losses) / max(sum(count for _, count in losses), 1)


def _known(part: Part, column: int) -> Part:
    known = ~np.isnan(part.wanted[:, column])
    return Part(part.rows if known.all() else part.rows[known], part.wanted[known, column])


def _best(path: Iterator, column: Target, valid: Part, class_weight) -> tuple:
    """The head of the path, from strong penalties to weak ones, with the lowest loss on the held-out rows."""
    best, worse = None, 0
    rows, wanted = torch.from_numpy(valid.rows), torch.from_numpy(valid.wanted.astype(np.float32))[:, None]
    single = Targets("classification" if column.classes else "regression", "sequence", (column,))
    lowest = np.inf
    for weight, bias, of_rows, penalty, left_out in path:
        loss, count = single.loss(of_rows(rows), wanted, [class_weight])
        if best is None or float(loss) + left_out < lowest:
            best, worse, lowest = (weight, bias, (float(loss), count), penalty), 0, float(loss) + left_out
        else:
            worse += 1
        if worse > _PATIENCE and column.classes:
            break
    return best


def _of_rows(weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, spread: np.ndarray):
    """The head as a function of rows that are not standardised."""
    folded = torch.from_numpy((weight / spread).astype(np.float32))
    shift = torch.from_numpy((bias - (weight / spread) @ mean).astype(np.float32))
    return lambda rows: rows @ folded.T + shift


def _numbers(train: Part, mean: np.ndarray, spread: np.ndarray) -> Iterator[tuple]:
    """Ridge regression (Hoerl and Kennard 1970), the intercept without a penalty."""
    width, count = train.rows.shape[1], max(len(train.rows), 1)
    gram, product, total = np.zeros((width, width)), np.zeros(width), np.zeros(width)
    middle = train.wanted.mean(dtype=np.float64) if len(train.wanted) else 0.0
    for at in range(0, len(train.rows), _ROWS):
        block = (train.rows[at : at + _ROWS] - mean) / spread
        gram += block.T @ block
        product += block.T @ (train.wanted[at : at + _ROWS] - middle)
        total += block.sum(axis=0)
    gram -= np.outer(total, total) / count  # of these rows' own mean: not all have this label
    values, vectors = np.linalg.eigh(gram)
    turned = vectors.T @ product
    shrunk = values.clip(min=0)[:, None] + _PENALTIES * count
    left_out = np.zeros(len(_PENALTIES))
    for at in range(0, len(train.rows), _ROWS):
        block = ((train.rows[at : at + _ROWS] - mean) / spread - total / count) @ vectors
        own = np.square(block) @ (1 / shrunk) + 1 / count  # of each row's prediction, its label's part
        errors = (train.wanted[at : at + _ROWS] - middle)[:, None] - block @ (turned[:, None] / shrunk)
        left_out += np.square(errors / (1 - own).clip(min=1e-6)).sum(axis=0)
    for number, penalty in enumerate(_PENALTIES):
        weight = vectors @ (turned / shrunk[:, number])
        bias = np.array([middle - weight @ (total / count)])
        yield weight[None], bias, _of_rows(weight[None], bias, mean, spread), float(penalty), float(left_out[number])


def _classes(column: Target, train: Part, valid: Part, mean, spread, balanced: bool) -> Iterator[tuple]:
    """Logistic regression with softmax over all classes, those of other penalties being where each one begins."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ImportError("classes need scikit-learn: pip install 'esm_fast[sklearn]'") from None
    rows = ((train.rows - mean) / spread).astype(np.float32)
    wanted = train.wanted.astype(np.int64)
    weighing = "balanced" if balanced else None
    model = LogisticRegression(max_iter=300, tol=1e-4, warm_start=True, class_weight=weighing)
    for penalty in _LOGISTIC_PENALTIES:
        model.set_params(C=1 / (penalty * len(rows)))
        with _unconverged():
            model.fit(rows, wanted)
        weight, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
        if len(weight) == 1:  # two classes: the second's logit, the first's being 0
            weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
        yield weight, bias, _of_rows(weight, bias, mean, spread), float(penalty), 0.0


@contextmanager
def _unconverged() -> Iterator[None]:
    """A weak penalty may need more steps than it gets; the held-out loss judges what it has come to."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[at : at + _ROWS].astype(np.float64) for at in range(0, len(rows), _ROWS))
