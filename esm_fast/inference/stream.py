"""The stream: tokens of proteins through a model in packed batches, their results in input order."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from .. import ops
from ..models.encoder import Encoder
from ..ops.common import spans
from ..sequences.batching import pack, plan
from ..sequences.tokenize import Tokens
from .windows import Segment, segments, share_of

POOLS = ("mean", "cls", "per_residue")
# Batches planned together: enough to fill each one well, few enough to keep results waiting for their turn small.
_BATCHES_AHEAD = 8
_SPECIAL = 2  # <cls> and <eos>


class Output(NamedTuple):
    """One array to make of each protein: a layer under one of POOLS, or its contact map (CONTACTS)."""

    pool: str
    layer: int = 0


CONTACTS = Output("contacts")  # (residues, residues) probabilities


class Protein(NamedTuple):
    """One protein's results: an array for each Output asked for, in that order."""

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

    A protein of more than `window` residues, by default the model's limit, is cut into windows (see `embed`), which a
    contact map cannot be joined from:
    for CONTACTS, tokenize with overlength "error" or "truncate". After each batch, on_batch gets the residues done: a
    bar can move although the proteins, which come in input order, have to wait for each other.
    """
    joined = _Joiner(outputs)
    for group in _groups(segments(tokens, window or model.config.limit("error")), _BATCHES_AHEAD * budget):
        for segment, arrays in zip(group, _run(model, group, outputs, budget, on_batch), strict=True):
            if (complete := joined.add(segment, arrays)) is not None:
                yield Protein(segment.label, complete)


def _groups(segments: Iterable[Segment], limit: int) -> Iterator[list[Segment]]:
    """Consecutive segments of at most `limit` tokens together (or a single one)."""
    group, size = [], 0
    for segment in segments:
        length = segment.length + _SPECIAL
        if group and size + length > limit:
            yield group
            group, size = [], 0
        group.append(segment)
        size += length
    if group:
        yield group


def _run(model: Encoder, group: list[Segment], outputs: list[Output], budget: int, on_batch) -> list[list[np.ndarray]]:
    """Per segment of the group, one array an output."""
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
def _forward(model: Encoder, batch, outputs: list[Output], segments: list[Segment]) -> list[list[np.ndarray]]:
    """Per output, one array a segment."""
    bounds = spans(batch.cu_seqlens)  # from the host's copy, so that nobody waits for a GPU's
    batch = batch.to(model.device)
    layers = {output.layer for output in outputs if output != CONTACTS}
    computed = model.forward_packed(batch, layers=layers, contacts=CONTACTS in outputs)
    made = []
    for output in outputs:
        if output == CONTACTS:
            made.append([map_[1:-1, 1:-1].float().cpu().numpy().copy() for map_ in computed.contacts])
        else:
            x = computed.representations[output.layer]
            made.append(_pooled(model, x, output.pool, batch.cu_seqlens, bounds, segments))
    return made


def _pooled(model: Encoder, x, pool: str, cu_seqlens, bounds, segments: list[Segment]) -> list[np.ndarray]:
    """Per segment, (embed_dim,), or (residues, embed_dim) for per_residue. bounds: the rows of each."""
    if pool == "per_residue":
        rows = x.cpu().numpy()
        return [rows[start + 1 : end - 1].copy() for start, end in bounds]
    weight = np.zeros(len(x))
    for (start, end), segment in zip(bounds, segments, strict=True):
        if pool == "cls":
            weight[start] = 1
        else:  # each residue of the protein counts once, however many windows cover it
            weight[start + 1 : end - 1] = share_of(segment) / segment.residues
    return list(ops.pool(x, cu_seqlens, torch.from_numpy(weight).to(x), backend=model.backend).cpu().numpy())


class _Joiner:
    """Puts the windows of a long protein together; a protein of one segment passes through."""

    def __init__(self, outputs: list[Output]):
        self.pools = [output.pool for output in outputs]
        self.sums: list[np.ndarray] = []

    def add(self, segment: Segment, arrays: list[np.ndarray]) -> list[np.ndarray] | None:
        """One array an output once the protein is complete, else None."""
        if len(segment.windows) == 1:
            return arrays
        if CONTACTS.pool in self.pools:
            raise ValueError(f"{segment.label!r} has {segment.residues} residues: contacts cannot be made of windows")
        if segment.number == 0:
            self.sums = [
                np.zeros((segment.residues, array.shape[-1]) if pool == "per_residue" else array.shape, array.dtype)
                for pool, array in zip(self.pools, arrays, strict=True)
            ]
        for pool, total, array in zip(self.pools, self.sums, arrays, strict=True):
            if pool == "per_residue":
                at = segment.windows[segment.number]
                total[at : at + segment.length] += array * share_of(segment)[:, None].astype(array.dtype)
            else:
                total += array / len(segment.windows) if pool == "cls" else array
        return self.sums if segment.last else None
