"""What a linear head makes of a layer: a row a protein, of its mean, or a row a residue.

Of a protein in windows: the head of its mean over all residues; of residues, the mean of the windows' rows. A predictor
makes these (`train.predictor`): there is no prediction without a head, so none is found by name.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from . import Batch, Given
from .pooled import Mean
from .residues import Residues


@dataclass(frozen=True)
class OfProtein(Mean):
    """(outputs,) float32. weight: float32 (outputs, embed_dim); bias: (outputs,)."""

    weight: np.ndarray = field(compare=False, kw_only=True)
    bias: np.ndarray = field(compare=False, kw_only=True)

    name = "prediction"

    def finish(self, whole) -> np.ndarray:
        return self.weight @ whole.astype(np.float32) + self.bias


@dataclass(frozen=True)
class OfResidues(Residues):
    """(residues, outputs) float32. weight: float32 (outputs, embed_dim); bias: (outputs,)."""

    weight: torch.Tensor = field(compare=False, kw_only=True)
    bias: torch.Tensor = field(compare=False, kw_only=True)

    name = "prediction"

    def reduce(self, given: Given, batch: Batch) -> list[np.ndarray]:
        rows = given.representations[self.layer]
        weight, bias = (t.to(rows.device, torch.float32) for t in (self.weight, self.bias))
        # Each protein by itself: its neighbours in the batch change no bit of it.
        return [(rows[start + 1 : end - 1].float() @ weight.T + bias).cpu().numpy() for start, end in batch.bounds]


OUTPUTS = {}
