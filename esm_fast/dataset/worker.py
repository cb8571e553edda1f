"""Units through the model: the next are read while one is computed and the last are written."""

import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from ..files.atomic import remove_leftovers
from . import layout
from .plan import Plan
from .units import Results, Sequences, Unit, is_done, write

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
    """Where one process is, and what it has committed so far."""

    stage: str = "planning"  # then "computing", then, of a process that is alone, "verifying"
    total: int = 0  # residues of the stage; 0 while planning, which does not know it yet
    done: int = 0  # of them, those of earlier runs included
    units: int = 0
    already_done: int = 0  # units
    sequences: int = 0
    residues: int = 0
    bytes: int = 0
    status: Counter = field(default_factory=Counter)
    last: Committed | None = None  # set while it is told of a unit
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.perf_counter() - self.start

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        self.stage, self.total, self.done, self.last, self.start = stage, total, done, None, time.perf_counter()

    def at(self, stage: str) -> "Progress":
        """This, where nothing was committed just now."""
        self.stage, self.last = stage, None
        return self

    def add(self, committed: Committed) -> None:
        self.units += 1
        self.sequences += committed.sequences
        self.residues += committed.residues
        self.done += committed.residues
        self.bytes += committed.bytes
        self.status.update(committed.status)
        self.last = committed


def prepare_folders(plan: Plan) -> None:
    for name in (layout.POOLED, *([layout.RESIDUES] if plan.settings.residues else [])):
        (plan.folder / name).mkdir(exist_ok=True)
        remove_leftovers(plan.folder / name)


def remaining(plan: Plan, rank: int, count: int) -> list[int]:
    """This share's units that are not done yet."""
    return [unit for unit in range(rank, plan.units, count) if not is_done(plan, unit)]


def work(
    plan: Plan, units: list[int], compute: Callable[[Unit], Results], on_commit: Callable[[Committed], None]
) -> None:
    """Computes and commits units, in order; on_commit is called, in the thread that writes, for each on the disk.

    An error, in whatever thread, ends it: what is being written is finished, the rest is left.
    """
    sequences, waiting = Sequences(plan), iter(units)
    ahead, behind = deque[Future](), deque[Future]()
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:

        def read_on() -> None:
            ahead.extend(reader.submit(sequences.unit, unit) for unit in islice(waiting, _AHEAD - len(ahead)))

        def commit(results: Results, seconds: float) -> None:
            size, unit = write(plan, results), results.unit
            status = dict(Counter(results.status))
            on_commit(Committed(unit.number, len(unit.lengths), int(unit.lengths.sum()), size, seconds, status))

        read_on()
        while ahead:
            unit = ahead.popleft().result()
            read_on()
            if is_done(plan, unit.number):  # by another process, meanwhile
                continue
            start = time.perf_counter()
            results = compute(unit)
            behind.append(writer.submit(commit, results, time.perf_counter() - start))
            while len(behind) > _BEHIND:
                behind.popleft().result()
        for future in behind:
            future.result()
