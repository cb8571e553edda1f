"""The order of an epoch without a list of it: a permutation that is computed, of any number of records.

`batches.Steps` sorts random numbers and keeps them, some fifty bytes a record in every process. Here a process keeps
nothing a record but what the store maps; what a step holds is defined alike: records one after the other, cut where
an epoch's tokens are divided into equal shares.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .random import MEMBER, ORDER, STEP, mix, streams, uniform
from .store import Store

_CHUNK = 1 << 18  # positions at a time
_ROUNDS = 6


@dataclass(frozen=True)
class Permutation:
    """A random order of 0 to count - 1: an unbalanced Feistel network (Black and Rogaway 2002) on pairs of digits of
    about sqrt(count), in which numbers beyond `count` are mapped again."""

    count: int
    stream: np.uint64

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 -> int64, both from 0 to count - 1."""
        found = self._once(positions)
        while len(beyond := np.flatnonzero(found >= self.count)):
            found[beyond] = self._once(found[beyond])
        return found

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        low = int(np.ceil(np.sqrt(self.count)))
        high = -(-self.count // low)
        left, right = np.divmod(numbers.astype(np.int64), low)
        for number in range(0, _ROUNDS, 2):
            left = (left + self._hash(right, number, high)) % high
            right = (right + self._hash(left, number + 1, low)) % low
        return left * low + right

    def _hash(self, digits: np.ndarray, number: int, limit: int) -> np.ndarray:
        salt = np.uint64((int(self.stream) + int(STEP) * (number + 1)) % 2**64)
        return (mix(digits.astype(np.uint64) + salt) >> np.uint64(33)).astype(np.int64) % limit


@dataclass
class Permuted:
    """Epochs of a store's training records, each cut into steps of about equal numbers of tokens.

    by_cluster: an epoch has one record of each cluster, another each time. limit: residues of a record at most.
    """

    store: Store
    seed: int
    step_tokens: int
    limit: int
    by_cluster: bool = False
    _next: tuple = field(default=(None, 0, 0, 0), init=False, repr=False)  # epoch, step of it, position, tokens before
    _total_of: tuple = field(default=(None, 0), init=False, repr=False)  # epoch, its tokens

    def __post_init__(self):
        # Tokens of an epoch, in the mean and at least.
        self.expected, self.fewest = self._by_cluster() if self.by_cluster else 2 * (self._sum(),)

    @property
    def least(self) -> int:
        """Records that every step has, as far as is known without a walk: none begins in a step's share of an epoch's
        tokens only where one is longer than that share."""
        return self.fewest // self.per_epoch // (self.limit + 2)

    @property
    def per_epoch(self) -> int:
        return max(1, -(-self.expected // self.step_tokens))

    def epoch_of(self, step: int) -> int:
        return step // self.per_epoch

    def of(self, step: int) -> np.ndarray:
        """The records of a step, counted from 0 through all epochs. Steps in a row cost what they hold; others a walk
        from the epoch's beginning."""
        epoch, number = divmod(step, self.per_epoch)
        known, at, position, before = self._next
        if (known, at) != (epoch, number):
            position = before = at = 0
        total, share, found = self._total(epoch), self.per_epoch, []
        first, end = (k * total / share for k in (number, number + 1))
        for positions, records, tokens in self._walk(epoch, position):
            begins = before + np.cumsum(tokens) - tokens
            found.append(records[(begins >= first) & (begins < end)])
            past = np.flatnonzero(begins >= end)
            if len(past):
                position, before = int(positions[past[0]]), int(begins[past[0]])
                break
            before += int(tokens.sum())
        self._next = epoch, number + 1, position, before
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _total(self, epoch: int) -> int:
        """Tokens of an epoch."""
        if not self.by_cluster:
            return self.expected
        if self._total_of[0] != epoch:
            self._total_of = epoch, sum(int(tokens.sum()) for _, _, tokens in self._walk(epoch, shuffled=False))
        return self._total_of[1]

    def _walk(self, epoch: int, start: int = 0, *, shuffled: bool = True) -> Iterator[tuple]:
        """(positions, records, tokens) of an epoch, from a position on."""
        count = len(self.store.clusters) - 1 if self.by_cluster else len(self.store)
        order = Permutation(count, streams(self.seed, ORDER, epoch, [0])[0]) if shuffled else None
        size = 1024 if shuffled else _CHUNK  # a step is small: what it does not take is computed again by the next
        while start < count:
            size = min(2 * size, _CHUNK)
            positions = np.arange(start, min(start + size, count))
            numbers = positions if order is None else order(positions)
            start += size
            if self.by_cluster:
                records = self._members(epoch, numbers)
            else:
                kept = self.store.valid[numbers] == 0
                positions, records = positions[kept], numbers[kept]
            yield positions, records, self.store.tokens_of(records, self.limit)

    def _members(self, epoch: int, clusters: np.ndarray) -> np.ndarray:
        begins, ends = self.store.clusters[clusters], self.store.clusters[clusters + 1]
        chance = uniform(streams(self.seed, MEMBER, epoch, clusters), 0)
        return self.store.members[begins + np.floor(chance * (ends - begins)).astype(np.int64)]

    def _sum(self) -> int:
        """Tokens of all training records."""
        store, total = self.store, 0
        for start in range(0, len(store), _CHUNK):
            # Read, not mapped: a process would seem to have all that it has once looked at.
            offsets = np.fromfile(store.path / "offsets", "<i8", _CHUNK + 1, offset=8 * start)
            lengths = np.diff(offsets)
            tokens = np.minimum(lengths, self.limit) + 2
            total += int(tokens[store.valid[start : start + _CHUNK] == 0].sum())
        return total

    def _by_cluster(self) -> tuple[int, int]:
        """Tokens that an epoch has in the mean, and with the shortest of each cluster."""
        clusters, total, fewest = self.store.clusters, 0.0, 0
        for start in range(0, len(clusters) - 1, _CHUNK):
            bounds = clusters[start : start + _CHUNK + 1]
            tokens = self.store.tokens_of(self.store.members[bounds[0] : bounds[-1]], self.limit)
            begins = bounds[:-1] - bounds[0]
            total += float((np.add.reduceat(tokens, begins) / np.diff(bounds)).sum())
            fewest += int(np.minimum.reduceat(tokens, begins).sum())
        return round(total), fewest
