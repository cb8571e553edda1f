"""What a run makes of its time: tokens a second, the MFU and the goodput."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from .model import training_flops
from .recipe import Recipe


class Meter:
    """started: when the run began, by `time.perf_counter`; world: its processes."""

    def __init__(self, recipe: Recipe, world: int, started: float):
        self.recipe, self.world, self.started = recipe, world, started
        self._stepping = 0.0  # seconds in steps
        self.restart()

    def restart(self) -> None:
        """Without what was done since the last `read`."""
        self._began, self._tokens, self._flops = time.perf_counter(), 0, 0.0

    def add(self, work) -> None:
        """A step's."""
        self._tokens += int(work.lengths.sum())
        self._flops += training_flops(self.recipe.model, work.lengths, work.selected)

    def read(self) -> dict:
        """Since the last time; of the goodput, since the run began."""
        now, peak = time.perf_counter(), self.recipe.peak_tflops
        seconds = now - self._began
        self._stepping += seconds
        mfu = self._flops / seconds / (peak * 1e12 * self.world) if peak else None
        found = {"tokens_per_second": self._tokens / seconds, "mfu": mfu}
        self.restart()
        return found | {"goodput": self._stepping / (now - self.started)}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is no step."""
        paused = time.perf_counter()
        yield
        self._began += time.perf_counter() - paused
