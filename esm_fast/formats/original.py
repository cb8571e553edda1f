"""A matrix as it was read, in the place of which a prepacked one is going to stand."""

from collections.abc import Callable, Iterator

import torch

_AT_ONCE = 1 << 20  # elements that are converted together


def keep(tensor: torch.Tensor) -> None:
    """What is done to rows that were used, where nothing is."""


class Original:
    """Gives a matrix's rows in the type of its model, some at a time: a large one, mapped from a file and of another
    type, is never in memory as a whole.

    forget: is given rows of `matrix` from the first one on, that were used.
    """

    def __init__(self, matrix: torch.Tensor, dtype: torch.dtype, forget: Callable[[torch.Tensor], None] = keep):
        self.matrix, self.dtype, self.forget = matrix.detach(), dtype, forget

    def rows(self, first: int, last: int, columns=slice(None)) -> torch.Tensor:
        """A copy, unless nobody forgets and the type is theirs already."""
        whole = self.matrix[first:last]
        rows = whole[:, columns].to(self.dtype, copy=self.forget is not keep)
        if self.forget is not keep:
            self.forget(self.matrix[:last])  # all so far: what was let go may come back with the next ones
        return rows

    def parts(self, at_once: int = 0, columns=slice(None)) -> Iterator[torch.Tensor]:
        """All rows, in order, so many at once."""
        out, width = self.matrix.shape
        at_once = at_once or max(1, _AT_ONCE // width)
        for first in range(0, out, at_once):
            yield self.rows(first, min(first + at_once, out), columns)

    def whole(self) -> torch.Tensor:
        """All of it in the model's type."""
        if self.forget is keep or self.matrix.dtype == self.dtype:
            return self.matrix.to(self.dtype)
        found, first = self.matrix.new_empty(self.matrix.shape, dtype=self.dtype), 0
        for part in self.parts():
            found[first : first + len(part)] = part
            first += len(part)
        return found
