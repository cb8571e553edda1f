"""What a command says of its work: lines for people as they come, or with --json one object for scripts at its end."""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

from . import human_bytes, size_of


class Summary:
    """A command tells each fact once, in words and as a value; the frame decides which of the two is printed.

    as_json: nothing is printed until `end`; whatever else prints meanwhile goes to standard error, so that standard
    output holds the object and nothing else.
    """

    def __init__(self, command: str = "", as_json: bool = False, **facts):
        self.as_json, self._facts, self._whole = as_json, {"command": command, **facts}, None
        self._begin = time.perf_counter()
        self.heard = True  # False in all processes of a training but the one that tells

    @property
    def seconds(self) -> float:
        """Since the command began, loading its model included."""
        return time.perf_counter() - self._begin

    def say(self, *lines: str, **facts) -> None:
        """lines: for people. facts: for scripts, under names that all commands use for the same thing."""
        self._facts |= facts
        if self.heard and not self.as_json:
            print(*lines, sep="\n", end="\n" * bool(lines), flush=True)

    def output(self, path: str | Path, **facts) -> None:
        """What was written, how large it is, and what the whole took; said last."""
        path = Path(path)
        size = size_of(path)
        self.time()
        self.say(f"output    {path} ({human_bytes(size)})", output=str(path), bytes=size, **facts)

    def time(self, file=None) -> None:
        """file: in the place of standard output, where that is a table."""
        line = f"time      {self.seconds:.1f} s in all"
        if file is not None:
            print(line, file=file)
        else:
            self.say(line)

    def replace(self, value) -> None:
        """With --json, this in place of the object: where another tool's form is promised."""
        self._whole = value

    def speaking(self) -> contextlib.AbstractContextManager:
        """Whatever is printed within goes to standard error, with --json."""
        return contextlib.redirect_stdout(sys.stderr) if self.as_json else contextlib.nullcontext()

    def end(self, code: int) -> None:
        """Prints the object, where one was asked for. code: the exit code."""
        if self.heard and self.as_json:
            whole = self._facts | {"seconds": round(self.seconds, 3), "exit_code": code}
            print(json.dumps(_finite(whole if self._whole is None else self._whole), default=str))


def _finite(value):
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy's and torch's numbers
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
