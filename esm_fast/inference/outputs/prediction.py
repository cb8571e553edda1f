"""What a head makes of a layer: a row a protein, of its mean or of what it looks at, or a row a residue.

Of a protein in windows: the head of its mean over all residues, or its softmax over all windows' residues; of residues,
the mean of the windows' rows. A predictor makes these (`train.predictor`): there is no prediction without a head, so
none is found by name. head: as in `train.heads`, float32.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..windows import Segment, share_of
from . import Batch, Given, Needs, Output
from .pooled import Mean
from .residues import Residues


def of_row(head, row: np.ndarray) -> np.ndarray:
    """(outputs,) of float32 (width,), by a head on the CPU."""
    if head.kind == "linear":
        return head.weight.numpy() @ row + head.bias.numpy()
    return head(torch.from_numpy(row)[None])[0].numpy()


@dataclass(frozen=True)
class OfProtein(Mean):
    """(outputs,) float32; the head is on the CPU."""

    head: Any = field(compare=False, kw_only=True)

    name = "prediction"

    def finish(self, whole) -> np.ndarray:
        return of_row(self.head, whole.astype(np.float32))


@dataclass(frozen=True)
class OfResidues(Residues):
    """(residues, outputs) float32."""

    head: Any = field(compare=False, kw_only=True)

    name = "prediction"

    def reduce(self, given: Given, batch: Batch) -> list[np.ndarray]:
        rows = given.representations[self.layer]
        # Each protein by itself: its neighbours in the batch change no bit of it.
        return [self._of(rows[start + 1 : end - 1].float()) for start, end in batch.bounds]

    def _of(self, rows: torch.Tensor) -> np.ndarray:
        if self.head.kind != "linear":
            return self.head(rows).cpu().numpy()
        weight, bias = self.head.weight, self.head.bias
        if rows.device.type != "cpu":
            return (rows @ weight.T + bias).cpu().numpy()
        # Products this small are sooner done than torch's threads have begun.
        return rows.numpy() @ weight.numpy().T + bias.numpy()


@dataclass(frozen=True)
class OfAttention(Output):
    """(outputs,) float32: each the mean of values over the residues, weighted by a softmax of scores.

    A part is (largest score, sum of weights, weighted sum), each (outputs,), as in a softmax in pieces (Milakov and
    Gimelshein 2018). A residue in several windows counts once.
    """

    layer: int
    head: Any = field(compare=False, kw_only=True)

    name = "prediction"
    per = "protein"

    def needs(self, batch: Batch) -> Needs:
        return Needs(layers=(self.layer,))

    def reduce(self, given: Given, batch: Batch) -> list[np.ndarray]:
        rows, found = given.representations[self.layer], []
        for segment, start, end in batch.spans():
            own = rows[start + 1 : end - 1].float()
            score, value = (own @ weight.T for weight in (self.head.query, self.head.weight))
            most = score.amax(0) if len(own) else score.new_zeros(score.shape[1])
            share = (score - most).exp() * torch.from_numpy(share_of(segment)).to(score)[:, None]
            found.append(torch.stack([most, share.sum(0), (share * value).sum(0)]).cpu().numpy())
        return found

    def join(self, whole, part, segment: Segment):
        if whole is None:
            return part
        most = np.maximum(whole[0], part[0])
        whole, part = (piece[1:] * np.exp(piece[0] - most) for piece in (whole, part))
        return np.concatenate([most[None], whole + part])

    def finish(self, whole) -> np.ndarray:
        total = np.where(whole[1], whole[1], 1)  # 0 of a protein without residues
        return whole[2] / total + self.head.bias.cpu().numpy()


OUTPUTS = {}
