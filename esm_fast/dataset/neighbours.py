"""Nearest proteins by cosine: exact, every embedding compared, a shard at a time."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from .reader import Dataset

_QUERIES = 4096  # compared at once


class Hits(NamedTuple):
    """Per query, the best first, no more than there are sequences; row -1 where fewer have an embedding."""

    rows: np.ndarray  # int64 (queries, k): sequences, over all shards
    cosines: np.ndarray  # float32 (queries, k)


def search(
    data: Dataset, queries: np.ndarray, k: int, layer: int = -1, on_pairs: Callable[[int], None] = lambda count: None
) -> Hits:
    """queries: (n, width). Ties go to the sequence that came first in the input. on_pairs: told what was compared."""
    k = min(k, data.plan.info["sequences"])
    parts = [_search(data, queries[at : at + _QUERIES], k, layer, on_pairs) for at in range(0, len(queries), _QUERIES)]
    return Hits(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _search(data: Dataset, queries: np.ndarray, k: int, layer: int, on_pairs) -> Hits:
    wanted = _normalised(queries)
    best = torch.full((len(queries), k), -torch.inf)
    rows = torch.full((len(queries), k), -1)
    for first, block in data.blocks(layer):
        cosines = (wanted @ _normalised(block).T).nan_to_num(-torch.inf)  # NaN: it has no embedding
        all_cosines = torch.cat([best, cosines], dim=1)
        all_rows = torch.cat([rows, torch.arange(first, first + len(block)).expand(len(queries), -1)], dim=1)
        best, places = all_cosines.sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :k], all_rows.gather(1, places[:, :k])
        on_pairs(cosines.numel())
    rows[best.isneginf()] = -1
    return Hits(rows.numpy(), best.numpy())


def _normalised(rows: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)
