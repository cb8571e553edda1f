"""What came of a try, made in a fork of its own under limits of time and memory."""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable

REFUSED, RIGHT, LOADED = "refused in one line", "right", "loaded"
CRASHED, HUNG, TRACEBACK, RAW, CODE, WRONG = (
    "CRASHED",
    "HUNG",
    "TRACEBACK",
    "RAW CONTROL CHARACTERS",
    "CODE RAN",
    "WRONG",
)
BAD = {CRASHED, HUNG, TRACEBACK, RAW, CODE, WRONG}
_SECONDS, _BYTES = 30, 8 << 30


def of(call: Callable[[], str | None]) -> str:
    """What a function returns in a fork (LOADED for None); REFUSED for a ValueError or OSError of a printable line."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        _limit()
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        try:
            outcome = call() or LOADED
        except (ValueError, OSError) as error:
            outcome = REFUSED if str(error).isprintable() and str(error) else RAW
        except BaseException as error:
            outcome = f"{TRACEBACK}\n{''.join(traceback.format_exception(error))}"
        os.write(writing, outcome.encode("utf-8", "replace")[:60_000])
        os._exit(0)
    os.close(writing)
    return _read(pid, reading)


def of_command(arguments: list[str]) -> str:
    """What came of a command line: by its exit code, and what it wrote to standard error."""

    def run() -> str:
        from esm_fast.cli import main

        read, write = os.pipe()
        os.set_blocking(write, False)
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(write, number)
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
        sys.stderr.flush()
        os.set_blocking(read, False)
        try:
            said = os.read(read, 1 << 16).decode(errors="replace")
        except BlockingIOError:
            said = ""
        if "Traceback" in said or code not in (0, None, 1, 2, 3):
            return f"{TRACEBACK}\n{said}"
        if not all(c.isprintable() or c in "\n\r\t" for c in said):
            return RAW
        return REFUSED if code in (1, 2) else LOADED

    return of(run)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    signal.alarm(20 * _SECONDS)  # also where something else holds the machine


def _read(pid: int, reading: int) -> str:
    with os.fdopen(reading, "rb") as stream:
        said = stream.read().decode("utf-8", "replace")
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return HUNG if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL) else CRASHED
    outcome, _, text = said.partition("\n")
    if text:
        print(text, file=sys.stderr)
    return outcome or CRASHED
