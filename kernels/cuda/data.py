"""The data path on the GPU: residues to tokens, tokens to packed batches, and masking.

Bytes go up and embeddings come down; what is computed equals the CPU's: data.py, packing.py, train/masking.py.
"""

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from esm_fast.train.masking import REPLACEMENTS, Masking

from .common import ceil_div, launch

_BYTES, _TOKENIZE_THREADS = 16, 256  # tokenize.cu
_TOKENS, _THREADS = 4, 128  # pack.cu
_MASK_THREADS = 256  # mask.cu
_NOWHERE = 2**63 - 1
_UNUSED = torch.float32  # of kernels that have no dtype: they are compiled for this one


class TokenizedRecords(NamedTuple):
    """Ids of records, and what was found out about each: see RecordCheck in csrc/esm.h."""

    ids: Tensor  # uint8; record r is ids[starts[r] : starts[r] + counts[r]]
    starts: Tensor  # int64 (n,)
    counts: Tensor  # int32 (n,)
    unknown: Tensor  # int32 (n,): bytes that are no residue, each read as X
    first_unknown: Tensor  # int32 (n,): column of the first
    stops: Tensor  # bool (n,): a final '*' was dropped
    worst: Tensor  # int64 (): record << 32 | column of the first such byte of all, 2**63 - 1 if there is none


def tokenize(residues: Tensor, offsets: Tensor) -> TokenizedRecords:
    """Token ids of upper-cased ASCII, uint8: record r lies between offsets[r] and offsets[r + 1], int64 from 0."""
    records, device = len(offsets) - 1, residues.device
    ids = torch.empty_like(residues)
    flags = torch.zeros(records, dtype=torch.int32, device=device)
    grid = ceil_div(len(residues), _BYTES * _TOKENIZE_THREADS)
    launch("tokenize", "bytes", _UNUSED, grid, _TOKENIZE_THREADS, residues, offsets, ids, flags, len(residues), records)
    counts, unknown, first = (torch.empty(records, dtype=torch.int32, device=device) for _ in range(3))
    stops = torch.empty(records, dtype=torch.uint8, device=device)
    worst = torch.full((1,), _NOWHERE, device=device)
    grid = ceil_div(records, _TOKENIZE_THREADS)
    tensors = residues, offsets, flags, ids, counts, unknown, first, stops, worst
    launch("tokenize", "records", _UNUSED, grid, _TOKENIZE_THREADS, *tensors, records)
    return TokenizedRecords(ids, offsets[:-1], counts, unknown, first, stops.bool(), worst[0])


def pack_tokens(ids: Tensor, starts: Tensor, order: Tensor, cu_seqlens: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(tokens, positions) int32 (n,) of the sequences that `order` names, as `esm_fast.packing.pack` computes them.

    cu_seqlens int32 (b + 1,) are the ends with <cls> and <eos>, n its last: known to whoever planned the batch, so that
    nothing waits for the GPU.
    """
    tokens, positions = (torch.empty(n, dtype=torch.int32, device=ids.device) for _ in range(2))
    tensors = ids, starts.contiguous(), order.contiguous(), cu_seqlens, tokens, positions
    grid = ceil_div(n, _TOKENS * _THREADS)
    launch("pack", "tokens", _UNUSED, grid, _THREADS, *tensors, n, len(order))
    return tokens, positions


def mask_tokens(
    tokens: Tensor, cu_seqlens: Tensor, records: Tensor, epoch: int, seed: int, masking: Masking
) -> tuple[Tensor, Tensor]:
    """(tokens as shown, targets: -100 where none) int32, as `esm_fast.train.masking.Masker` selects and replaces them.

    records int64 are the sequences' numbers in their store; a sequence's ends are <cls> and <eos>.
    """
    shown, targets = torch.empty_like(tokens), torch.empty_like(tokens)
    letters = REPLACEMENTS[masking.replacements]
    bounds = (_in_53_bits(share) for share in (masking.masked, masking.masked + masking.replaced))
    ends = int(masking.specials == "never")
    launch(
        "mask", "tokens", _UNUSED, len(records), _MASK_THREADS,
        tokens, cu_seqlens, records, shown, targets,
        epoch, ctypes.c_uint64(seed), ctypes.c_double(masking.share), *bounds, ends, int(letters[0]), int(letters[-1]),
    )  # fmt: skip
    return shown, targets


def _in_53_bits(share: float) -> ctypes.c_uint64:
    """The smallest number of 53 random bits that is no less than a share: exact, so that integers are compared."""
    return ctypes.c_uint64(math.ceil(share * 2**53))
