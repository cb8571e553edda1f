"""The language model's logits of all 33 tokens at residues, by its head in float32 at least.

In half precision a logit would be rounded to 8 bits, and the head is a hundredth of the work.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ... import ops
from ...alphabet import MASK
from ...ops.common import accumulate_dtype
from ..windows import Segment
from . import Batch, Given, Needs, Output
from .residues import joined


@dataclass(frozen=True)
class Logits(Output):
    """(residues, 33); of windows, the mean of theirs.

    only: of a segment the residues that are wanted, indices ascending; (those, 33), which cannot be made of windows.
    """

    only: Callable[[Segment], np.ndarray] | None = None

    name = "logits"
    per = "residue"

    def needs(self, batch: Batch) -> Needs:
        return Needs(rows=np.concatenate([start + 1 + self._at(segment) for segment, start, _ in batch.spans()]))

    def _at(self, segment: Segment) -> np.ndarray:
        return np.arange(segment.length) if self.only is None else np.asarray(self.only(segment), dtype=np.int64)

    def reduce(self, given: Given, batch: Batch) -> list[np.ndarray]:
        if given.model.lm_head is None:
            raise ValueError("the model has no language-model head, so it has no logits")
        ends = np.cumsum([len(self._at(segment)) for segment in batch.segments])
        return np.split(of_rows(given.model, given.rows).cpu().numpy(), ends[:-1])

    def join(self, whole, part, segment: Segment):
        return super().join(whole, part, segment) if self.only else joined(whole, part, segment)


def masks_of(segment: Segment) -> np.ndarray:
    """The residues that are <mask>: Logits(only=masks_of)."""
    return np.flatnonzero(segment.ids[segment.start : segment.start + segment.length] == MASK)


def of_rows(model, rows: torch.Tensor) -> torch.Tensor:
    """(m, 33) logits in float32 (float64 for such a model) of m rows of the last representation.

    A head with something attached, such as an adapter or a hook, is called as it is; its logits have its own type.
    """
    if not model.head_is_plain():
        return model.logits_of(rows)[0].to(accumulate_dtype(model.dtype))
    dtype = torch.promote_types(model.dtype, torch.float32)
    weights = {name: v.detach().to(dtype) if name != "eps" else v for name, v in model.lm_head.weights().items()}
    return ops.masked_lm_head(rows, **weights, backend=model.backend)[0]


OUTPUTS = {Logits.name: lambda layer=None: Logits()}
