"""A row a residue: a layer's representation, without <cls> and <eos>; windows join to their mean."""

from dataclasses import dataclass

import numpy as np

from ..windows import Segment, share_of
from . import Batch, Given, Needs, Output


def joined(whole, part: np.ndarray, segment: Segment) -> np.ndarray:
    """Rows of residues: where several windows cover one, the mean of theirs."""
    if whole is None:
        whole = np.zeros((segment.residues, part.shape[-1]), part.dtype)
    at = segment.windows[segment.number]
    whole[at : at + segment.length] += part * share_of(segment)[:, None].astype(part.dtype)
    return whole


@dataclass(frozen=True)
class Residues(Output):
    """(residues, embed_dim)"""

    layer: int

    name = "per_residue"
    per = "residue"

    def needs(self, batch: Batch) -> Needs:
        return Needs(layers=(self.layer,))

    def reduce(self, given: Given, batch: Batch) -> list[np.ndarray]:
        rows = given.representations[self.layer].cpu().numpy()
        return [rows[start + 1 : end - 1].copy() for start, end in batch.bounds]

    def join(self, whole, part, segment: Segment):
        return joined(whole, part, segment)


OUTPUTS = {Residues.name: Residues}
