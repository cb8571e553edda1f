"""What a command says of its work: lines for people as they come, or with --json one object for scripts at its end."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from . import human_bytes


class Summary:
    """A command tells each fact once, in words and as a value; the frame decides which of the two is printed.

    as_json: nothing is printed until `end`; whatever else prints meanwhile goes to standard error, so that standard
    output holds the object and nothing else.
    """

    def __init__(self, command: str = "", as_json: bool = False, **facts):
        self.as_json, self._facts, self._whole = as_json, {"command": command, **facts}, None
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the command began, loading its model included."""
        return time.perf_counter() - self._begin

    def say(self, *lines: str, **facts) -> None:
        """lines: for people. facts: for scripts, under names that all commands use for the same thing."""
        self._facts |= facts
        if not self.as_json:
            print(*lines, sep="\n", end="\n" * bool(lines), flush=True)

    def output(self, path: str | Path, **facts) -> None:
        """What was written, how large it is, and what the whole took; said last."""
        path = Path(path)
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        self.time()
        self.say(f"output    {path} ({human_bytes(size)})", output=str(path), bytes=size, **facts)

    def time(self) -> None:
        self.say(f"time      {self.seconds:.1f} s in all")

    def replace(self, value) -> None:
        """With --json, this in place of the object: where another tool's form is promised."""
        self._whole = value

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        if not self.as_json:
            yield
            return
        before, sys.stdout = sys.stdout, sys.stderr
        try:
            yield
        finally:
            sys.stdout = before

    def end(self, code: int) -> None:
        """Prints the object, where one was asked for. code: the exit code."""
        if self.as_json:
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
