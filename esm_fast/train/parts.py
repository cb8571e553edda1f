"""Rows of features and what a head should say of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

ROWS = 1 << 14  # converted to float64 at a time


@dataclass(frozen=True)
class Part:
    """rows: float32 (n, width); wanted: (n, columns), see `Targets`, or (n,) of one of them."""

    rows: np.ndarray
    wanted: np.ndarray

    def known(self, column: int) -> "Part":
        """The rows that have this column's label, and it."""
        known = ~np.isnan(self.wanted[:, column])
        return Part(self.rows if known.all() else self.rows[known], self.wanted[known, column])

    def __add__(self, other: "Part") -> "Part":
        return Part(np.concatenate([self.rows, other.rows]), np.concatenate([self.wanted, other.wanted]))


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread of each column, float64; a spread of 0 is given as 1."""
    mean = rows.mean(axis=0, dtype=np.float64)
    square = sum((np.square(block - mean).sum(axis=0) for block in _blocks(rows)), np.zeros_like(mean))
    spread = np.sqrt(square / len(rows))
    return mean, np.where(spread > 1e-12 * (1 + np.abs(mean)), spread, 1.0)


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[at : at + ROWS].astype(np.float64) for at in range(0, len(rows), ROWS))
