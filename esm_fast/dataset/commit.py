"""Files that are complete, checked and on the disk before they get their name.

Commit: write `.NAME.HOST-PID-N.partial` in the same folder, fsync it, read it back and check it, rename, fsync the
folder. Whatever stands under its own name is therefore whole; whatever stops on the way leaves a partial file, which
is locked while its writer lives, so that the next run can tell what is left of a dead one.
"""

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from ..files.atomic import sync

_numbers = count()
_READ_BYTES = 1 << 20
_DAY = 24 * 3600


class DatasetError(ValueError):
    """A data set that is damaged, incomplete, or another one than was asked for; the message says what to do."""


class Output:
    """The file being written; what pyarrow asks of one. It knows the SHA-256 of all it was given."""

    closed = False

    def __init__(self, handle: int):
        self._handle: int | None = handle
        self._hash, self._size = hashlib.sha256(), 0

    def abandon(self) -> None:
        """A writer that fails may be closed late, and write its footer: not into whatever the handle is by then."""
        self._handle = None

    def write(self, data) -> int:
        if self._handle is None:
            return len(data)
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._size += len(view)
        at = 0
        while at < len(view):  # the system may take a part only
            at += os.write(self._handle, view[at:])
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def committed(path: Path, check: Callable[[Path], None] = lambda path: None) -> Iterator[Output]:
    """Yields the file to write `path` to. It takes the place of `path` at the end, or goes on an error.

    What was read back must be what was written, and `check` may raise for what it finds in the file.
    """
    temporary, handle = _partial(path)
    output = Output(handle)
    try:
        yield output
        os.fsync(handle)
        if sha256(temporary) != output.sha256:
            raise OSError(f"{path}: the disk gave back other bytes than were written")
        check(temporary)
        os.replace(temporary, path)
        sync(path.parent)  # the rename itself
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finally:
        output.abandon()
        os.close(handle)


def _partial(path: Path) -> tuple[Path, int]:
    """A new partial file, open and locked."""
    while True:
        temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{next(_numbers)}.partial")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if temporary.exists():  # nobody removed it before it was locked
            return temporary, handle
        os.close(handle)


def remove_partial(folder: Path) -> None:
    """Removes what dead writers left; the files of living ones are locked.

    A lock may not be seen from another machine: what a writer there left goes when it is a day old.
    """
    for path in folder.glob(".*.partial"):
        with suppress(OSError):  # another run may be removing it too
            if f".{socket.gethostname()}-" not in path.name and time.time() - path.stat().st_mtime < _DAY:
                continue
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time; the lock of a dead one is free. Where the file system has no locks, all go on at once."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def digest_of(content) -> str:
    """SHA-256 of anything JSON can say, however its keys are ordered."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content | {"sha256": digest_of(content)}, indent=1) + "\n"
    with committed(path) as output:
        output.write(text.encode())


def read_json(path: Path) -> dict:
    """Raises DatasetError where a byte of it has changed."""
    data = path.read_bytes()
    try:
        content = json.loads(data)
        digest = content.pop("sha256")
        intact = json.dumps(content | {"sha256": digest}, indent=1).encode() + b"\n" == data
        intact = intact and digest == digest_of(content)
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise DatasetError(f"{path} is damaged: it does not match its own checksum")
    return content
