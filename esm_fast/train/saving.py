"""Checkpoints written beside the steps: a copy is taken, and a thread writes, hashes and renames it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from . import checkpoint
from .processes import Processes


class Saver:
    """One checkpoint is under way at most. A context: on leaving it nothing is.

    beside: in a thread, from a copy in host memory (see `checkpoint.share_of`), with exchanges of its own; else the
    steps wait. All processes make one.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes, *, beside: bool):
        self.folder, self.keep, self.processes = folder, keep, processes
        self._pool = ThreadPoolExecutor(1, "checkpoint") if beside else None
        self._others = processes.beside() if beside else processes
        self._coming: Future | None = None
        self._quiet = checkpoint.quiet()  # here: a thread cannot hold a filter of warnings to itself

    def __enter__(self) -> "Saver":
        self._quiet.__enter__()
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            with suppress(*[Exception] if kind else []):  # the first error is the one that is told
                self.wait()
        finally:
            if self._pool:
                self._pool.shutdown()
            self._quiet.__exit__(None, None, None)

    def save(self, step: int, parameters: dict, updater, state: dict) -> None:
        """Every process calls it. Raises CheckpointError, where the one before could not be written too."""
        self.wait()
        share = checkpoint.share_of(parameters, updater, self.processes, copy=self._pool is not None)
        write: Callable = partial(checkpoint.save, self.folder, step, share, state, self.keep, self._others)
        if self._pool:
            self._coming = self._pool.submit(write)
        else:
            write()

    def check(self) -> None:
        """Raises what went wrong since, if it is known. Several processes tell each other at the next `save`."""
        if self.processes.world == 1 and self._coming is not None and self._coming.done():
            self.wait()

    def wait(self) -> None:
        """Until the last one is whole. Raises CheckpointError."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.result()
