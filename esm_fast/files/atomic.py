"""Files that are whole, and on the disk, before they get their name.

A file is written beside its place under a name of its own (see `partial`), synced, renamed, and the folder synced: what
stands under its own name is whole. Whatever stops on the way leaves a partial file, which the next run removes.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import partial
from .checksums import sha256
from .partial import remove_leftovers

__all__ = ["Output", "alone", "atomic", "atomic_folder", "committed", "is_special", "remove_leftovers", "sync"]

_READ_BYTES = 1 << 20
_OF_SAFETENSORS = re.compile(r"serializing.*\(os error (\d+)\)")  # what it says of a file that it cannot write


@contextmanager
def atomic(path: Path, *, durable: bool = True, tidy: bool = True) -> Iterator[Path]:
    """Yields a temporary path to write to, which takes the place of `path` at the end, or is removed on an error.

    A symbolic link stays, and what it leads to is replaced; a device or a pipe stays and is written to at the end.

    Args:
        durable: have the disk confirm first (fsync), so that not even a power cut leaves an empty file under the name.
        tidy: remove first what earlier runs left of this file; whoever writes many into a folder does that once.
    """
    path = Path(path)
    if is_special(path):
        with _copied_to(path) as temporary:
            yield temporary
        return
    target = followed(path)
    if tidy:
        remove_leftovers(target.parent, target.name)
    with _temporary(path, target) as (temporary, handle):
        with _naming(path):
            yield temporary
        with _naming(path):
            handle.follow(temporary)  # safetensors puts a file of its own there, which nobody else may read
            os.fchmod(handle.number, _mode(target, handle))
            if durable:
                os.fsync(handle.number)
            os.replace(temporary, target)
            if durable:
                sync(target.parent)  # the rename itself


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder, which gets the name `path` at the end with its files synced, or is removed on an error.

    Raises FileExistsError where the name is taken, at the beginning or by then.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; choose another name or remove it")
    remove_leftovers(path.parent, path.name)
    with _temporary(path, path) as (temporary, _):
        folder = temporary.with_name(temporary.name + partial.FOLDER_ENDING)
        try:
            folder.mkdir()
            yield folder
            for file in folder.iterdir():
                sync(file)
            if os.path.lexists(path):  # a rename would replace an empty folder
                raise FileExistsError(f"{path} was made by another process meanwhile")
            folder.rename(path)
            sync(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Output:
    """A file being written; what pyarrow asks of one. It knows the SHA-256 of all it was given."""

    closed = False

    def __init__(self, handle: int, path: Path):
        self._handle: int | None = handle
        self._path = path
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
        with _naming(self._path):
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
def committed(
    path: Path, check: Callable[[Path], None] = lambda path: None, *, replace: bool = True
) -> Iterator[Output]:
    """Yields the file to write `path` to. It takes the place of `path` at the end, or is removed on an error.

    What was read back must be what was written, and `check` may raise for what it finds in the file. Without `replace`,
    raises FileExistsError where `path` is there by then.
    """
    target = followed(path)
    with _temporary(path, target) as (temporary, handle):
        output = Output(handle.number, path)
        try:
            yield output
            with _naming(path):
                os.fsync(handle.number)
                if sha256(temporary) != output.sha256:
                    raise OSError(f"{path}: the disk gave back other bytes than were written")
                check(temporary)
                _place(temporary, target, replace=replace)
                sync(target.parent)
        finally:
            output.abandon()


@contextmanager
def alone(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """One process at a time; the lock of a dead one is free.

    Yields False where the file system has no locks: then others may be here too.

    Raises BlockingIOError, without `wait`, where another process has it.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        held = partial.locked(handle, wait=wait)
        if not held or _is_still(path, handle):
            break
        os.close(handle)  # who had it has removed it: it is nobody's lock any more
    try:
        if held is False:
            raise BlockingIOError(f"{path} is locked by another process")
        yield bool(held)
    finally:
        os.close(handle)


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(handle))
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Has the disk confirm a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def followed(path: Path) -> Path:
    """Where the file is that a path leads to, there or not.

    Raises PermissionError for a link that others planted: in a folder that all may write to, only links of one's own or
    of the folder's owner are followed, as Linux itself does it where fs.protected_symlinks is set.
    """
    for _ in range(40):
        try:
            link = path.lstat()
        except FileNotFoundError:
            return path
        if not stat.S_ISLNK(link.st_mode):
            return path
        folder = path.parent.stat()
        if folder.st_mode & stat.S_IWOTH and link.st_uid not in (os.geteuid(), folder.st_uid):
            raise PermissionError(f"{path} is a link that another user put into a folder that all may write to")
        path = path.parent / os.readlink(path)
    raise OSError(f"{path}: too many links")


class _Handle:
    """The open file that holds the lock."""

    def __init__(self, number: int):
        self.number = number
        self.mode = stat.S_IMODE(os.fstat(number).st_mode)

    def follow(self, path: Path) -> None:
        """Holds the file that is at the path now, if that is another one."""
        there = os.stat(path, follow_symlinks=False)
        if os.path.samestat(there, os.fstat(self.number)):
            return
        number = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        partial.locked(number)
        os.close(self.number)
        self.number = number


@contextmanager
def _temporary(path: Path, target: Path) -> Iterator[tuple[Path, _Handle]]:
    with _naming(path):
        temporary, number = partial.new(target)
    handle = _Handle(number)
    try:
        yield temporary, handle
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        os.close(handle.number)


def _place(temporary: Path, target: Path, *, replace: bool) -> None:
    if replace:
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.replace(temporary, target)


def _mode(target: Path, handle: _Handle) -> int:
    """The permissions of the file that is replaced, else those that a new one gets."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(target.stat().st_mode)
    return handle.mode


def is_special(path: Path) -> bool:
    """A device or a pipe, or a link to one."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def _copied_to(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, path.name)
        temporary.touch()
        yield temporary
        with _naming(path), temporary.open("rb") as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, _READ_BYTES)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors name the file that the user knows, not the temporary one. Those without a name are of writing it: whoever
    reads a file meanwhile names it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        if str(error.filename).endswith(partial.ENDING):
            error.filename = str(path)
        raise
    except Exception as error:
        found = _OF_SAFETENSORS.search(str(error))
        if found is None or type(error).__name__ != "SafetensorError":
            raise
        raise OSError(number := int(found[1]), os.strerror(number), str(path)) from None
