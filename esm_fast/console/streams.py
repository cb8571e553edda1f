"""The standard streams while a command runs: whatever is printed, a terminal takes none of it as a command to itself.

Ids, names of models and names of files come from others, and with them control characters, which move the cursor, set
titles or hide lines; text that the terminal's encoding lacks; and streams that are closed, full, or read by nobody.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LINES = "\n\t"
BARS = "\n\r"  # a bar writes over its line


def printable(text: str, encoding: str = "utf-8", keep: str = "") -> str:
    """The text with each character escaped (\\x1b, \\u202e) that does not print, or that the encoding lacks."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)
    if text.isascii() or encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        return text
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class Screen:
    """A text stream that only what is printable goes through.

    lossy: what cannot be written is dropped, as messages are that nobody hears any more; the work continues. Otherwise
    OSError is raised, and says which stream it was.
    """

    def __init__(self, stream, name: str, *, keep: str = LINES, lossy: bool = False):
        self._stream, self._keep, self._lossy = stream, keep, lossy
        self.stream_name = name

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with self._failing():
            self._stream.write(printable(text, encoding, self._keep))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def bars(self) -> "Screen":
        """The same stream for a progress bar."""
        return Screen(self._stream, self.stream_name, keep=BARS, lossy=self._lossy)

    def __eq__(self, other) -> bool:
        return isinstance(other, Screen) and other._stream is self._stream

    def __hash__(self) -> int:
        return hash(id(self._stream))

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._redirect()
            if not self._lossy:
                error.filename = self.stream_name
                raise

    def _redirect(self) -> None:
        """What waits in the buffer goes nowhere, or the interpreter would fail on it at its end."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


OUTPUT, ERRORS = "standard output", "standard error"


@contextmanager
def screens() -> Iterator[None]:
    """sys.stdout and sys.stderr are Screens, also where they were closed."""
    _hold_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout = before[0] if isinstance(before[0], Screen) else Screen(before[0] or _nowhere(), OUTPUT)
    sys.stderr = before[1] if isinstance(before[1], Screen) else Screen(before[1] or _nowhere(), ERRORS, lossy=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _hold_descriptors() -> None:
    """0, 1 and 2 are open: or the next file that is opened, perhaps the output, would get what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):  # open takes the lowest number that is free
                os.open(os.devnull, os.O_RDWR)


def _nowhere() -> io.TextIOBase:
    return open(os.devnull, "w", encoding="utf-8")
