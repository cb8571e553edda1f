"""One vector a protein: mean, max or standard deviation over its residues, or <cls>; pooled in the model's pass.

<cls> and <eos> never enter mean, max and std. Of a protein in windows each residue counts once: where several windows
cover it, each for its share.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ...ops import StackPool
from ..windows import Segment, share_of
from . import Batch, Given, Needs, Output


@dataclass(frozen=True)
class _Pooled(Output):
    layer: int

    per = "protein"
    op: ClassVar[str] = "pool"

    def needs(self, batch: Batch) -> Needs:
        return Needs(pools=(StackPool(self.layer, self.op, batch.once(type(self), self._rows)),))

    def _rows(self, batch: Batch) -> torch.Tensor:
        """What the op takes for each token: the same of every layer."""
        rows = np.zeros(batch.bounds[-1][1])
        for segment, start, end in batch.spans():
            self.weigh(rows[start:end], segment)
        rows = torch.from_numpy(rows).to(batch.packed.tokens.device, batch.dtype)
        return rows != 0 if self.op == "pool_max" else rows

    def weigh(self, rows: np.ndarray, segment: Segment) -> None:
        """Sets the weights of a segment's tokens, which are 0."""
        raise NotImplementedError

    def reduce(self, given: Given, batch: Batch) -> list[np.ndarray]:
        return list(given.pooled[0].cpu().numpy())


class Mean(_Pooled):
    """The mean over the residues."""

    name = "mean"

    def weigh(self, rows: np.ndarray, segment: Segment) -> None:
        rows[1:-1] = share_of(segment) / segment.residues

    def join(self, whole, part, segment: Segment):
        return (np.zeros_like(part) if whole is None else whole) + part


class Cls(_Pooled):
    """The row of <cls>; of windows, the mean of theirs."""

    name = "cls"

    def weigh(self, rows: np.ndarray, segment: Segment) -> None:
        rows[0] = 1

    def join(self, whole, part, segment: Segment):
        return (np.zeros_like(part) if whole is None else whole) + part / len(segment.windows)


class Max(_Pooled):
    """The largest value over the residues, column by column; of windows, the largest of theirs."""

    name = "max"
    op = "pool_max"

    def weigh(self, rows: np.ndarray, segment: Segment) -> None:
        rows[1:-1] = 1

    def join(self, whole, part, segment: Segment):
        return part if whole is None else np.maximum(whole, part)


class Std(_Pooled):
    """The population standard deviation over the residues (divided by their number), column by column.

    Windows join by their means and squared deviations (Chan et al. 1983), in float64.
    """

    name = "std"
    op = "pool_moments"

    def weigh(self, rows: np.ndarray, segment: Segment) -> None:
        rows[1:-1] = share_of(segment)

    def join(self, whole, part, segment: Segment):
        weight, (mean, variance) = share_of(segment).sum(), part.astype(np.float64)
        if whole is None:
            return weight, mean, variance * weight
        before, mean_before, squares = whole
        total, apart = before + weight, mean - mean_before
        squares = squares + variance * weight + apart**2 * (before * weight / total)
        return total, mean_before + apart * (weight / total), squares

    def finish(self, whole) -> np.ndarray:
        if isinstance(whole, np.ndarray):
            return np.sqrt(whole[1])
        total, _, squares = whole
        return np.sqrt(squares / total).astype(np.float32)


OUTPUTS = {kind.name: kind for kind in (Mean, Cls, Max, Std)}
