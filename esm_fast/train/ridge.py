"""Ridge regression (Hoerl and Kennard 1970) for all penalties by one eigenvalue decomposition, chosen by rank.

A penalty is judged by Spearman's rank correlation of what it says of rows that it did not see: the squared error of few
noisy labels calls for penalties so strong that little of the order is left. The head is the mean of all whose
correlation is within a standard error of the best, so that no single one is taken by luck, and its predictions are
scaled to the lowest squared error of the same rows, so that numbers are right too.
"""

from dataclasses import dataclass

import numpy as np

from .parts import ROWS, Part, moments

PENALTIES = 10.0 ** np.arange(2, -6.5, -0.5)  # from the strongest, in units of the number of rows
_SCALES = (0.01, 1.0)  # a head that says nothing keeps its order


@dataclass(frozen=True)
class Choice:
    """The penalties over whose heads the mean is taken, and what it is multiplied by."""

    penalties: tuple[float, ...]
    scale: float


class Ridge:
    """Of a part's rows, standardised; the intercept has no penalty."""

    def __init__(self, part: Part):
        self.part, (self.mean, self.spread) = part, moments(part.rows)
        self.count, width = max(len(part.rows), 1), part.rows.shape[1]
        self.middle = part.wanted.mean(dtype=np.float64) if len(part.wanted) else 0.0
        gram, product = np.zeros((width, width)), np.zeros(width)
        for rows, wanted in self._blocks():
            gram += rows.T @ rows
            product += rows.T @ wanted
        self.values, self.vectors = np.linalg.eigh(gram)
        self.turned = self.vectors.T @ product

    def _blocks(self):
        """Rows standardised, and what they should be, less the mean."""
        for at in range(0, len(self.part.rows), ROWS):
            rows = (self.part.rows[at : at + ROWS] - self.mean) / self.spread
            yield rows, self.part.wanted[at : at + ROWS] - self.middle

    def _shrunk(self, penalties: np.ndarray) -> np.ndarray:
        return self.values.clip(min=0)[:, None] + penalties * self.count

    def heads(self, penalties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float64 (penalties, width) and (penalties,): weights and biases for rows that are not standardised."""
        weights = (self.vectors @ (self.turned[:, None] / self._shrunk(penalties))).T / self.spread
        return weights, self.middle - weights @ self.mean

    def left_out(self, penalties: np.ndarray) -> np.ndarray:
        """(rows, penalties): what a head says of each row that was solved on all others, in closed form."""
        found, shrunk = [], self._shrunk(penalties)
        for rows, wanted in self._blocks():
            rows = rows @ self.vectors
            own = np.square(rows) @ (1 / shrunk) + 1 / self.count  # of each row's prediction, its label's part
            errors = (wanted[:, None] - rows @ (self.turned[:, None] / shrunk)) / (1 - own).clip(min=1e-6)
            found.append(wanted[:, None] - errors + self.middle)
        return np.concatenate(found)

    def head(self, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
        """float64 (1, width) and (1,)."""
        weights, biases = self.heads(np.array(choice.penalties))
        weight, bias = weights.mean(axis=0), biases.mean()
        return choice.scale * weight[None], np.array([self.middle + choice.scale * (bias - self.middle)])


def choose(ridge: Ridge, valid: Part, *, left_out: bool) -> tuple[Choice, float, int]:
    """(the choice, the sum of its squared errors on rows that it did not see, how many these are).

    left_out: the rows of training count too, each as said by a head of all others.
    """
    weights, biases = ridge.heads(PENALTIES)
    said, wanted = valid.rows @ weights.T.astype(np.float32) + biases, valid.wanted.astype(np.float64)
    if left_out or not len(wanted):
        said = np.concatenate([ridge.left_out(PENALTIES), said])
        wanted = np.concatenate([ridge.part.wanted, wanted])
    ranks = _rank_correlations(said, wanted)
    near = ranks >= ranks.max() - len(wanted) ** -0.5
    mean, off = said[:, near].mean(axis=1) - ridge.middle, wanted - ridge.middle
    scale = float(np.clip(mean @ off / max(mean @ mean, 1e-300), *_SCALES))
    loss = float(np.square(scale * mean - off).sum())
    return Choice(tuple(PENALTIES[near].tolist()), scale), loss, len(wanted)


def _rank_correlations(said: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Spearman's, of each column of (rows, penalties) with (rows,); 0 where one is constant."""
    try:
        from scipy.stats import rankdata
    except ImportError:
        raise ImportError("the head's penalty needs scipy: pip install 'esm_fast[sklearn]'") from None
    ours, theirs = (rankdata(x, axis=0) - (len(x) + 1) / 2 for x in (said, wanted))
    spread = np.sqrt(np.square(ours).sum(axis=0) * np.square(theirs).sum())
    return np.nan_to_num(np.where(spread > 0, theirs @ ours / np.where(spread > 0, spread, 1), 0.0))
