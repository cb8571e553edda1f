"""The stream: tokens of proteins through a model in packed batches, their results in input order."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from ..models.encoder import Encoder
from ..ops.common import accumulate_dtype, spans
from ..sequences.batching import PackedBatch, consecutive, pack, plan
from ..sequences.tokenize import Tokens
from .outputs import Batch, Given, Output
from .windows import Segment, segments

# Batches planned together: enough to fill each one well, few enough to keep results waiting for their turn small.
_BATCHES_AHEAD = 8
_SPECIAL = 2  # <cls> and <eos>


class Protein(NamedTuple):
    """One protein's results: an array for each output asked for, in that order."""

    label: str
    arrays: list[np.ndarray]


def run(
    model: Encoder,
    tokens: Iterable[Tokens],
    outputs: list[Output],
    budget: int,
    on_batch=lambda residues: None,
    window=None,
) -> Iterator[Protein]:
    """Streams tokens through the model: the general form of `embed`, for writers that want several outputs at once.

    outputs: see `outputs.make`. A protein of more than `window` residues, by default the model's limit, is cut into
    windows (see `embed`), which not every output can be joined from: for contacts, tokenize with overlength "error" or
    "truncate". After each batch, on_batch gets the residues done: a bar can move although the proteins, which come in
    input order, wait for each other.
    """
    joined = _Joiner(outputs)
    cut = segments(tokens, window or model.config.limit("error"))
    for group in consecutive(cut, lambda segment: segment.length + _SPECIAL, _BATCHES_AHEAD * budget):
        for segment, parts in zip(group, _run(model, group, outputs, budget, on_batch), strict=True):
            if (complete := joined.add(segment, parts)) is not None:
                yield Protein(segment.label, complete)


def _run(model: Encoder, group: list[Segment], outputs: list[Output], budget: int, on_batch) -> list[list]:
    """Per segment of the group, one part an output."""
    lengths = np.array([segment.length for segment in group], dtype=np.int64)
    ids, starts = _join_ids(group)
    results: list = [None] * len(group)
    for chosen in plan(lengths + _SPECIAL, budget):
        made = _forward(model, pack(ids, starts, lengths, chosen), outputs, [group[i] for i in chosen])
        on_batch(sum(group[i].residues / len(group[i].windows) for i in chosen))
        for place, i in enumerate(chosen):
            results[i] = [of_output[place] for of_output in made]
    return results


def _join_ids(group: list[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """One array of residue ids, and where each segment starts in it. A group within one chunk needs no copy."""
    if all(segment.ids is group[0].ids for segment in group):
        return group[0].ids, np.array([segment.start for segment in group], dtype=np.int64)
    pieces = [segment.ids[segment.start : segment.start + segment.length] for segment in group]
    ends = np.cumsum([len(piece) for piece in pieces])
    return np.concatenate(pieces), np.concatenate([[0], ends[:-1]]).astype(np.int64)


@torch.inference_mode()
def _forward(model: Encoder, packed: PackedBatch, outputs: list[Output], segments: list[Segment]) -> list[list]:
    """Per output, a part for each segment."""
    bounds = spans(packed.cu_seqlens)  # from the host's copy, so that nobody waits for a GPU's
    batch = Batch(packed.to(model.device), segments, bounds, accumulate_dtype(model.dtype))
    needs = [output.needs(batch) for output in outputs]
    rows = _union([need.rows for need in needs if need.rows is not None])
    found = model.forward_packed(
        batch.packed,
        layers={layer for need in needs for layer in need.layers},
        pools=[pool for need in needs for pool in need.pools],
        rows=None if rows is None else torch.from_numpy(rows).to(model.device),
        contacts=any(need.contacts for need in needs),
    )
    pooled = iter(found.pooled)
    made = []
    for output, need in zip(outputs, needs, strict=True):
        own = found.rows
        if need.rows is not None and len(need.rows) < len(rows):
            own = own[torch.from_numpy(np.searchsorted(rows, need.rows)).to(own.device)]
        own_pools = list(islice(pooled, len(need.pools)))
        made.append(output.reduce(Given(model, found.representations, own_pools, own, found.contacts), batch))
    return made


def _union(rows: list[np.ndarray]) -> np.ndarray | None:
    if len(rows) < 2:
        return rows[0] if rows else None
    return np.unique(np.concatenate(rows))


class _Joiner:
    """Puts the windows of a long protein together; a protein of one segment passes through."""

    def __init__(self, outputs: list[Output]):
        self.outputs = outputs
        self.wholes: list = []

    def add(self, segment: Segment, parts: list) -> list[np.ndarray] | None:
        """One array an output once the protein is complete, else None."""
        if len(segment.windows) > 1:
            if segment.number == 0:
                self.wholes = [None] * len(parts)
            given = zip(self.outputs, self.wholes, parts, strict=True)
            parts = self.wholes = [output.join(whole, part, segment) for output, whole, part in given]
            if not segment.last:
                return None
            self.wholes = []
        return [output.finish(part) for output, part in zip(self.outputs, parts, strict=True)]
