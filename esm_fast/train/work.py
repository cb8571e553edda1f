"""A process's share of a step, made ahead of it, and what the step leaves."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from .masking import MaskedBatch


class Work(NamedTuple):
    """A process's share of a step."""

    batches: list[MaskedBatch]
    lengths: np.ndarray  # tokens of every sequence of the step, those of other processes too
    selected: int  # tokens of the step, likewise


class Done(NamedTuple):
    """What a step leaves, on the device: nothing has waited for it. () each, of this process: loss, the sum over its
    selected tokens; of all: norm, of the gradient; rate; scale, of an fp16 loss, or None."""

    work: Work
    loss: torch.Tensor
    norm: torch.Tensor
    rate: torch.Tensor
    scale: torch.Tensor | None


def together(works: list[Work]) -> Work:
    """Of several stores, in one step."""
    batches = [batch for work in works for batch in work.batches]
    return Work(batches, np.concatenate([work.lengths for work in works]), sum(work.selected for work in works))


def ahead(items: Iterable[Work]) -> Iterator[Work]:
    """The items of an iterator, the next one made while the current one is used."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, "batches") as pool:
        coming = pool.submit(next, iterator, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, iterator, None)
            yield item
