"""The probability that two residues touch, for each pair; it cannot be made of windows."""

from dataclasses import dataclass

import numpy as np

from . import Batch, Given, Needs, Output


@dataclass(frozen=True)
class Contacts(Output):
    """(residues, residues) probabilities. The model needs a fitted regression."""

    name = "contacts"
    per = "pair"

    def needs(self, batch: Batch) -> Needs:
        return Needs(contacts=True)

    def reduce(self, given: Given, batch: Batch) -> list[np.ndarray]:
        return [map_[1:-1, 1:-1].float().cpu().numpy().copy() for map_ in given.contacts]


OUTPUTS = {Contacts.name: lambda layer=None: Contacts()}
