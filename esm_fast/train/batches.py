"""Which records each step, rank and packed batch gets: a pure function of (seed, step number).

A step is a fixed list of records, whatever the number of processes; ranks share it. So a run is resumed in the middle
of an epoch by the number of its step alone, with as many processes as there are, and no record is lost or doubled.
"""

import heapq
from dataclasses import dataclass, field

import numpy as np

from .random import ORDER, streams


@dataclass
class Steps:
    """Epochs of shuffled records, each cut into steps of about equal numbers of tokens.

    lengths: tokens of each record; step_tokens: a step has about as many or fewer, to within a record.
    """

    records: np.ndarray
    lengths: np.ndarray
    seed: int
    step_tokens: int
    _known: tuple | None = field(default=None, init=False, repr=False)  # the last epoch asked for

    @property
    def least(self) -> int:
        """Records that every step has."""
        return int(self.lengths.sum()) // self.per_epoch // int(self.lengths.max())

    @property
    def per_epoch(self) -> int:
        return max(1, -(-int(self.lengths.sum()) // self.step_tokens))

    def epoch_of(self, step: int) -> int:
        return step // self.per_epoch

    def of(self, step: int) -> np.ndarray:
        """The records of a step."""
        return self.records[self[step]]

    def __getitem__(self, step: int) -> np.ndarray:
        """The indices into `records` of a step, counted from 0 through all epochs."""
        epoch, number = divmod(step, self.per_epoch)
        order, ends = self._epoch(epoch)
        return order[ends[number] : ends[number + 1]]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._known is None or self._known[0] != epoch:
            chance = streams(self.seed, ORDER, epoch, self.records)
            order = np.argsort(chance, kind="stable")
            begins = np.cumsum(self.lengths[order]) - self.lengths[order]
            targets = np.arange(self.per_epoch + 1) * int(self.lengths.sum()) / self.per_epoch
            self._known = epoch, (order, np.searchsorted(begins, targets))
        return self._known[1]


def share(lengths: np.ndarray, ranks: int, batch_tokens: int) -> list[list[np.ndarray]]:
    """[rank][batch] -> indices: every one once, batches and ranks balanced by tokens, at least one batch on each rank.

    Longest first, each into the emptiest batch. A batch is over batch_tokens only where a single sequence is. Where
    most sequences fill a batch alone, some ranks have one batch more than others.
    """
    limit = max(batch_tokens, int(lengths.max()))
    count = max(1, -(-int(lengths.sum()) // (ranks * batch_tokens)))
    while True:
        parts = [part for part in balanced(lengths, ranks * count) if len(part)]
        if max(int(lengths[part].sum()) for part in parts) <= limit:
            return [parts[rank::ranks] for rank in range(ranks)]
        count += 1


def balanced(lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """Indices into `lengths`, longest first, each in the part with the least so far."""
    members, heap = [[] for _ in range(parts)], [(0, part) for part in range(parts)]
    for index in np.argsort(-lengths, kind="stable").tolist():
        tokens, part = heapq.heappop(heap)
        members[part].append(index)
        heapq.heappush(heap, (tokens + int(lengths[index]), part))
    return [np.array(part, dtype=np.int64) for part in members]
