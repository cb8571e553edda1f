"""The best linear head on features that do not change, solved instead of descended to.

Features are standardised. For numbers it is ridge regression, for classes logistic regression. What their penalties are
is judged by rows that the head did not see: those of the validation part, and, of proteins, those of the training part
too, left out in turn, for a small validation part tells little. Residues of a protein tell of each other, so that at
their level whole proteins are held out, those of the validation part.
"""

from dataclasses import dataclass

import numpy as np

from . import logistic, ridge
from .parts import Part
from .targets import Targets

_MANY = 2000  # held-out classes: what is left out of training in turn would add little, and takes the time


@dataclass(frozen=True)
class Solved:
    """weight: float64 (outputs, width); bias: (outputs,); loss: held out, a label; choices: one a column, a penalty of
    logistic regression or the `ridge.Choice`."""

    weight: np.ndarray
    bias: np.ndarray
    loss: float
    choices: tuple

    @property
    def penalties(self) -> list[list[float]]:
        """Of each column, in units of the number of rows; the head of numbers is a mean over several."""
        return [list(c.penalties) if isinstance(c, ridge.Choice) else [c] for c in self.choices]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return (rows @ self.weight.T.astype(np.float32) + self.bias.astype(np.float32)).astype(np.float32)


def solve(targets: Targets, train: Part, valid: Part, *, balanced: bool = False) -> Solved:
    """On the training part. balanced: every class weighs alike in the loss of training and in that of validation."""
    heads, choices, losses, counts = [], [], 0.0, 0
    left_out = targets.level == "sequence"
    class_weights = targets.class_weights(train.wanted, balanced)
    for number, column in enumerate(targets.columns):
        own, held = train.known(number), valid.known(number)
        if column.classes:
            choice, head, loss, count = logistic.choose(
                own,
                held,
                len(column.classes),
                class_weights[number],
                balanced=balanced,
                left_out=left_out and len(held.wanted) < _MANY,
            )
        else:
            solver = ridge.Ridge(own)
            choice, loss, count = ridge.choose(solver, held, left_out=left_out)
            head = solver.head(choice)
        heads.append(head)
        choices.append(choice)
        losses, counts = losses + loss, counts + count
    return _joined(heads, losses / max(counts, 1), choices)


def solve_again(targets: Targets, part: Part, solved: Solved, *, balanced: bool = False) -> Solved:
    """With the penalties of another, on other rows."""
    heads = []
    for number, (column, choice) in enumerate(zip(targets.columns, solved.choices, strict=True)):
        own = part.known(number)
        if column.classes:
            heads.append(logistic.Logistic(own, balanced).head(choice))
        else:
            heads.append(ridge.Ridge(own).head(choice))
    return _joined(heads, solved.loss, solved.choices)


def _joined(heads: list, loss: float, choices) -> Solved:
    weights, biases = zip(*heads, strict=True)
    return Solved(np.concatenate(weights), np.concatenate(biases), loss, tuple(choices))
