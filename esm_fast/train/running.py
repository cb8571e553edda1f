"""A run among other programs: its output is its own, and a scheduler may ask it to stop."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..files.atomic import alone
from .processes import Processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send before a job's time is over
STOPPED = 75  # the exit code: a temporary failure, to be run again
_LOCK = "run.lock"


class BusyError(ValueError):
    """The output is in use, or cannot be used."""


class Stopped(Exception):
    """The run was asked to stop, and has saved; the same command resumes it."""


@contextmanager
def only_run(output: Path, processes: Processes) -> Iterator[None]:
    """Makes the folder, and has it for this run alone: the first process takes the lock, and tells the others.

    Raises BusyError, in all processes.
    """
    with ExitStack() as stack:
        problem = ""
        if processes.first:
            try:
                output.mkdir(parents=True, exist_ok=True)
                if not stack.enter_context(alone(output / _LOCK, wait=False)):
                    warnings.warn(f"{output} has no locks: see that nobody else trains into it", stacklevel=2)
            except BlockingIOError:
                problem = f"another process trains into {output}; wait for it, or choose another output"
            except OSError as error:
                problem = f"{output} cannot be used: {error.strerror or error}"
        if problem := "".join(processes.gather(problem)):
            raise BusyError(problem)
        yield


class Agreed:
    """Whether any process was asked to stop. All of them ask once a step, and know it a step later: nobody waits for
    the steps of others, or for the device."""

    def __init__(self, processes: Processes):
        self.processes = processes.beside()
        self._asked: Callable[[], float] | None = None

    def ask(self, asked: bool) -> bool:
        if self.processes.world == 1:
            return asked
        before, self._asked = self._asked, self.processes.sum_beside(float(asked))
        return before is not None and before() > 0

    def close(self) -> None:
        """All processes have asked equally often."""
        if self._asked is not None:
            self._asked()


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Yields the list to which signals to stop are added as they come. In the main thread; elsewhere it stays empty."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
