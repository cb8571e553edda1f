"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

_numbers = count()


@contextmanager
def atomic(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which takes the place of `path` at the end, or goes on an error.

    durable: have the disk confirm first (fsync), so that not even a power cut leaves an empty file under the name.
    """
    temporary = path.with_name(f".{os.getpid()}-{next(_numbers)}.partial")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of its own there, which nobody else may read
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)  # the rename itself
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Has the disk confirm a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
