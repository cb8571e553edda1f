"""Signals that ask for an end: a run stops between two batches, and the same command resumes it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StoppedError(Exception):
    """A signal asked for an end."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], None]]:
    """Yields what raises StoppedError once SIGTERM or SIGUSR1 came, which schedulers send ahead of the end, or SIGHUP.

    A second signal acts at once. One that is ignored (nohup) stays so.
    """
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    stopped, numbers = threading.Event(), [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number, _frame):
        stopped.set()
        signal.signal(number, before[number])

    def check() -> None:
        if stopped.is_set():
            raise StoppedError

    for number in numbers:
        signal.signal(number, note)
    try:
        yield check
    finally:
        for number in numbers:
            signal.signal(number, before[number])
