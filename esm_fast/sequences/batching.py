"""Sequences end to end instead of padded: the plan of batches under a token budget, and `PackedBatch`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from esm_fast import _C
from esm_fast.alphabet import PAD

T = TypeVar("T")


@dataclass(frozen=True)
class PackedBatch:
    """`b` sequences end to end, `n` tokens in all, none of them padding."""

    tokens: Tensor  # int32 (n,), cls and eos included
    positions: Tensor  # int32 (n,): 2, 3, ... in each sequence, rows of the position table (padding_idx + 1 + index)
    cu_seqlens: Tensor  # int32 (b + 1,): sequence i is [cu_seqlens[i], cu_seqlens[i + 1])
    max_seqlen: int  # tokens of the longest sequence
    order: Tensor  # int64 (b,): order[i] is the caller's index of sequence i

    def __len__(self) -> int:
        return len(self.order)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, int32 (b,), cls and eos included."""
        return self.cu_seqlens.diff()

    def to(self, device: torch.device | str) -> "PackedBatch":
        tensors = (t.to(device, non_blocking=True) for t in (self.tokens, self.positions, self.cu_seqlens, self.order))
        tokens, positions, cu_seqlens, order = tensors
        return PackedBatch(tokens, positions, cu_seqlens, self.max_seqlen, order)


def plan(lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Batches of sequence indices, int64, that hold every sequence once and, where it can be, at most `batch_tokens`.

    `lengths` are tokens, cls and eos included. Longest first, ties by index; a batch takes the next sequence while its
    sum stays within the budget, and a sequence longer than the budget has a batch of its own.
    """
    lengths = _checked(lengths, batch_tokens)
    return _C.plan(lengths, batch_tokens)


def consecutive(items: Iterable[T], tokens_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """The items in their order, in groups of at most `limit` tokens together, or of a single item."""
    group, total = [], 0
    for item in items:
        tokens = tokens_of(item)
        if group and total + tokens > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += tokens
    if group:
        yield group


def plan_definition(lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """What `plan` computes, in Python; the tests compare the two."""
    lengths = _checked(lengths, batch_tokens)
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = consecutive(longest_first, lengths.__getitem__, batch_tokens)
    return [np.array(batch, dtype=np.int64) for batch in batches]


def _checked(lengths, batch_tokens: int) -> np.ndarray:
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or (lengths.size and not np.issubdtype(lengths.dtype, np.integer)):
        raise TypeError(f"lengths is {lengths.dtype} {lengths.shape}: give a flat list of whole numbers")
    if lengths.size and lengths.min() < 0:
        raise ValueError(f"lengths[{lengths.argmin()}] is {lengths.min()}: a length is 0 or more")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}: the budget is at least 1 token")
    return lengths.astype(np.int64, copy=False)


def pack(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> PackedBatch:
    """Packs the sequences that `order` names, in that order, with cls and eos around each.

    `ids` uint8 are residues without cls and eos; sequence s is `ids[starts[s] : starts[s] + lengths[s]]`, and sequences
    may overlap (windows over a long record need no copy). Raises IndexError where one lies outside `ids`.
    """
    arrays = {"ids": ids, "starts": starts, "lengths": lengths, "order": order}
    for name, array in arrays.items():
        if np.ndim(array) != 1:
            raise ValueError(f"{name} has {np.ndim(array)} dimensions: give a flat array")
    tokens, positions, cu_seqlens, max_seqlen = _C.pack(ids, starts, lengths, order)
    as_tensor = torch.from_numpy
    order = np.array(order, dtype=np.int64)
    return PackedBatch(as_tensor(tokens), as_tensor(positions), as_tensor(cu_seqlens), max_seqlen, as_tensor(order))


def pack_padded(tokens: Tensor, keep: Tensor | None = None) -> tuple[PackedBatch, Tensor]:
    """Packs the kept tokens of padded `tokens` (B, T), on their device; `keep` bool (B, T), by default all but padding.

    Returns the batch and `rows` int64 (n,): where the kept tokens stood in the flattened (B * T), for
    `ops.pack_rows` and `ops.unpack_rows`. Positions are those fair-esm and transformers give: they count the row's
    tokens that are not padding, kept or not, and a kept padding token has position 1. A row with nothing kept stays, as
    a sequence of length 0.
    """
    if tokens.dim() != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens is {tokens.dtype} {tuple(tokens.shape)}: give token ids (B, T)")
    real = tokens.ne(PAD)
    keep = real if keep is None else keep.bool()
    if keep.shape != tokens.shape:
        raise ValueError(f"keep is {tuple(keep.shape)}: give it the shape of tokens, {tuple(tokens.shape)}")
    positions = real.cumsum(1) * real + PAD
    rows = keep.flatten().nonzero().squeeze(1)
    lengths = keep.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    order = torch.arange(len(tokens), device=tokens.device)
    longest = int(lengths.max()) if len(lengths) else 0
    flat_tokens, flat_positions = tokens.flatten()[rows].int(), positions.flatten()[rows].int()
    return PackedBatch(flat_tokens, flat_positions, cu_seqlens, longest, order), rows
