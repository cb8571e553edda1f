"""Units through the model: the next are read while one is computed and the last are written."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from . import layout, shards
from .commit import remove_partial
from .plan import Plan

_AHEAD, _BEHIND = 2, 1  # units read, and computed but not yet written: what memory has to hold beside the one at work


@dataclass
class Committed:
    """A unit that is on the disk."""

    unit: int
    sequences: int
    residues: int
    bytes: int
    seconds: float  # computing it
    status: dict[str, int]


@dataclass
class Progress:
    """Of one process."""

    units: int = 0
    already_done: int = 0  # units
    sequences: int = 0
    residues: int = 0
    bytes: int = 0
    status: Counter = field(default_factory=Counter)
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def add(self, committed: Committed) -> None:
        self.units += 1
        self.sequences += committed.sequences
        self.residues += committed.residues
        self.bytes += committed.bytes
        self.status.update(committed.status)


def prepare_folders(plan: Plan) -> None:
    for name in (layout.POOLED, *([layout.RESIDUES] if plan.fields["residues"] else [])):
        (plan.folder / name).mkdir(exist_ok=True)
        remove_partial(plan.folder / name)


def remaining(plan: Plan, rank: int, count: int) -> list[int]:
    """This share's units that are not done yet."""
    return [unit for unit in range(rank, plan.units, count) if not shards.is_done(plan, unit)]


def work(plan: Plan, units: list[int], compute: Callable[[shards.Unit], shards.Results]) -> Iterator[Committed]:
    """Computes and commits units, in order; yields each when it is on the disk.

    Leaving it early drops the unit at work and finishes those being written.
    """
    sequences = shards.Sequences(plan)
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        waiting, ahead = iter(units), deque[Future]()
        behind = deque[Future]()
        try:
            while True:
                while len(ahead) < _AHEAD and (number := next(waiting, None)) is not None:
                    ahead.append(reader.submit(sequences.unit, number))
                if not ahead:
                    break
                unit = ahead.popleft().result()
                if shards.is_done(plan, unit.number):  # by somebody else, meanwhile
                    continue
                start = time.perf_counter()
                results = compute(unit)
                behind.append(writer.submit(_write, plan, results, time.perf_counter() - start))
                while behind and (len(behind) > _BEHIND or behind[0].done()):
                    yield behind.popleft().result()
            while behind:
                yield behind.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _write(plan: Plan, results: shards.Results, seconds: float) -> Committed:
    size = shards.write(plan, results)
    unit = results.unit
    return Committed(
        unit.number, len(unit.lengths), int(unit.lengths.sum()), size, seconds, dict(Counter(results.status))
    )
