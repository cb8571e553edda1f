"""Masked language modelling (Devlin et al. 2019) as ESM-1b's model card and fairseq have it, on packed batches."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..alphabet import MASK
from ..ops.masked_lm_head import IGNORED
from ..sequences.batching import PackedBatch, pack
from .random import ACTION, COUNT, CROP, REPLACEMENT, SELECT, streams, uniform
from .store import Store

# What a selected token may be replaced by: all 27 letters of the alphabet, as in fairseq, or the 20 amino acids.
REPLACEMENTS = {"symbols": np.arange(4, 31), "amino_acids": np.arange(4, 24)}


@dataclass(frozen=True)
class Masking:
    """share: of the tokens that are selected; of these, `masked` become <mask>, `replaced` another letter.

    specials: whether <cls> and <eos> may be selected: "never" (the card: amino acids), or "selected" as in fairseq.
    replacements: one of REPLACEMENTS; the letter that stood there is never its own replacement.
    """

    share: float = 0.15
    masked: float = 0.8
    replaced: float = 0.1
    specials: str = "never"
    replacements: str = "symbols"

    def __post_init__(self):
        for name, allowed in {"specials": ("never", "selected"), "replacements": tuple(REPLACEMENTS)}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"masking: {name} is {getattr(self, name)!r}; choose from {', '.join(allowed)}")
        for name in ("share", "masked", "replaced"):
            if not 0 <= (value := getattr(self, name)) <= 1:  # nan neither
                raise ValueError(f"masking: {name} is {value}; give a share from 0 to 1")
        if not self.share:
            raise ValueError("masking: share is 0, which selects nothing to learn from; give more")
        if self.masked + self.replaced > 1:
            raise ValueError(f"masking: masked is {self.masked} and replaced is {self.replaced}, together more than 1")

    def for_validation(self) -> "Masking":
        """The same selection, every selected token shown as <mask>."""
        return replace(self, masked=1.0, replaced=0.0)


@dataclass(frozen=True)
class MaskedBatch:
    """What the model sees, and the right tokens of the selected rows."""

    batch: PackedBatch  # its `order` holds the records' numbers in the store
    rows: torch.Tensor  # int64 (m,), ascending
    targets: torch.Tensor  # int64 (m,)

    def pinned(self) -> "MaskedBatch":
        """In pinned memory, from which a GPU copies beside the host's work."""
        batch = self.batch
        parts = (part.pin_memory() for part in (batch.tokens, batch.positions, batch.cu_seqlens))
        tokens, positions, cu_seqlens = parts
        packed = PackedBatch(tokens, positions, cu_seqlens, batch.max_seqlen, batch.order.pin_memory())
        return MaskedBatch(packed, self.rows.pin_memory(), self.targets.pin_memory())

    def without_loss(self) -> "MaskedBatch":
        return MaskedBatch(self.batch, self.rows, torch.full_like(self.targets, IGNORED))

    def to(self, device) -> "MaskedBatch":
        rows, targets = (t.to(device, non_blocking=True) for t in (self.rows, self.targets))
        return MaskedBatch(self.batch.to(device), rows, targets)


@dataclass(frozen=True)
class Masker:
    """Crops, packs and masks records of a store; every decision is a function of (seed, epoch, record, position)."""

    store: Store
    masking: Masking
    seed: int
    max_residues: int

    def lengths(self, records: np.ndarray) -> np.ndarray:
        """Tokens of each record as the model sees it: cropped, with <cls> and <eos>."""
        return self.store.tokens_of(records, self.max_residues)

    def selected(self, records: np.ndarray, epoch: int) -> np.ndarray:
        """How many tokens of each record are selected: floor(share * length + U), so `share` of all in the mean."""
        length = self.lengths(records) - (0 if self.masking.specials == "selected" else 2)
        chance = uniform(streams(self.seed, COUNT, epoch, records), 0)
        return np.floor(self.masking.share * length + chance).astype(np.int64).clip(max=length)

    def batch(self, records: np.ndarray, epoch: int) -> MaskedBatch:
        packed, residues = self._pack(records, epoch), self.lengths(records) - 2
        tokens = packed.tokens.numpy()
        segment = np.repeat(np.arange(len(records)), residues + 2)
        position = packed.positions.numpy().astype(np.int64) - 2
        rows = self._select(records, epoch, segment, position)
        targets = tokens[rows].astype(np.int64)
        tokens[rows] = self._shown(targets, records[segment[rows]], position[rows], epoch)
        return MaskedBatch(packed, torch.from_numpy(rows), torch.from_numpy(targets))

    def _pack(self, records: np.ndarray, epoch: int) -> PackedBatch:
        whole, residues = self.store.lengths_of(records), self.lengths(records) - 2
        chance = uniform(streams(self.seed, CROP, epoch, records), 0)
        starts = self.store.offsets[records] + np.floor(chance * (whole - residues + 1)).astype(np.int64)
        packed = pack(self.store.tokens, starts, residues, np.arange(len(records)))
        order = torch.from_numpy(np.array(records, dtype=np.int64))
        return PackedBatch(packed.tokens, packed.positions, packed.cu_seqlens, packed.max_seqlen, order)

    def _select(self, records, epoch: int, segment, position) -> np.ndarray:
        """Rows, without replacement: those with the smallest random numbers of their record."""
        chance = uniform(streams(self.seed, SELECT, epoch, records)[segment], position)
        lengths = self.lengths(records)
        if self.masking.specials == "never":
            chance[(position == 0) | (position == lengths[segment] - 1)] = 2
        order = np.lexsort((chance, segment))
        first = np.cumsum(lengths) - lengths
        rank = np.arange(len(segment)) - first[segment]  # segment is ascending, in `order` too
        return np.sort(order[rank < self.selected(records, epoch)[segment]])

    def _shown(self, targets, records, position, epoch: int) -> np.ndarray:
        """What stands in the place of selected tokens."""
        masking = self.masking
        action = uniform(streams(self.seed, ACTION, epoch, records), position)
        chance = uniform(streams(self.seed, REPLACEMENT, epoch, records), position)
        replaced = action < masking.masked + masking.replaced
        shown = np.where(replaced, _other(targets, chance, REPLACEMENTS[masking.replacements]), targets)
        return np.where(action < masking.masked, MASK, shown)


def _other(targets: np.ndarray, chance: np.ndarray, letters: np.ndarray) -> np.ndarray:
    """A letter different from the target, uniformly; `letters` is a range."""
    among = (targets >= letters[0]) & (targets <= letters[-1])
    chosen = letters[0] + np.floor(chance * (len(letters) - among)).astype(np.int64)
    return chosen + (among & (chosen >= targets))
