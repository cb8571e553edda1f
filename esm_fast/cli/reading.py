"""Files whose reading moves a bar: how many bytes there are is known before anything is read, which records are not."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path


def bytes_of(paths: Iterable[str]) -> int | None:
    """Of all files together; None with standard input or a pipe among them."""
    paths = [Path(path) for path in paths]
    return sum(path.stat().st_size for path in paths) if all(path.is_file() for path in paths) else None


class Watched:
    """What `read_fasta` takes, a path or "-": opened at the first read, and closed at its end."""

    def __init__(self, path: str, on_bytes: Callable[[int], None]):
        self.path, self.on_bytes, self._file = path, on_bytes, None
        self.name = "<stdin>" if path == "-" else os.fsdecode(path)

    def read(self, size: int) -> bytes:
        if self._file is None:
            self._file = self._opened()
        data = self._file.read(size)
        self.on_bytes(len(data))
        if not data and self.path != "-":
            self._file.close()
        return data

    def _opened(self):
        if self.path != "-":
            return open(self.path, "rb", buffering=0)
        from ..sequences.fasta import standard_input

        return standard_input()
