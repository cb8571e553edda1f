"""Temporary files whose writer can be told: names no other process, container or machine gives, locked while it lives.

`.NAME.HOST-MACHINE-NAMESPACE-PID-RANDOM.partial`: MACHINE is a hash of the running kernel's id, NAMESPACE the one that
PID counts in. Every container has a process 1, and hosts of one cluster may share a name: the random part keeps their
files apart, and the others say whether a lock, a process or only age can tell that a writer is dead.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

ENDING = ".partial"
FOLDER_ENDING = ".folder"  # what follows the name of a partial file is the folder that it stands for
_DAY = 24 * 3600
_SHOWN = 80  # bytes of NAME: with the rest it must fit in the 255 of a file name
_WRITER = re.compile(
    r"\.(?P<host>[^/]*)-(?P<machine>[0-9a-f]{8})-(?P<space>[0-9a-f]+)-(?P<pid>\d+)-[0-9a-f]{8}\.partial"
)
_EARLIER = re.compile(r"\.[^/]*-\d+-\d+\.partial")  # .NAME.HOST-PID-NUMBER.partial, of earlier versions
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class Writer(NamedTuple):
    host: str
    machine: str  # empty where an earlier version wrote it
    space: str
    pid: int


def new(target: Path) -> tuple[Path, int]:
    """A new partial file beside `target`, open for reading and writing, and locked where the file system can."""
    while True:
        host, machine, space = _here()
        writer = f"{host}-{machine}-{space}-{os.getpid()}-{secrets.token_hex(4)}"
        path = target.with_name(f"{_start(target.name)}{writer}{ENDING}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(path, flags, 0o666)
        locked(handle)
        if path.exists():  # nobody removed it before it was locked
            return path, handle
        os.close(handle)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what dead writers left in a folder, or of one file of it; the files of living ones stay.

    Others' files stay too, and so does what is not known to be left: a lock or a process on another machine may be
    invisible from here, and then a file goes when nobody has written to it for a day.
    """
    start = None if name is None else _start(name)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(ENDING) and entry.name.startswith(start or "."):
                with suppress(OSError):  # another run may be removing it too
                    _remove_if_dead(Path(entry.path))


def locked(handle: int, *, wait: bool = True) -> bool | None:
    """Locks an open file: True; False, without `wait`, where another has it; None on a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except OSError as error:
        return False if error.errno in _BUSY and not wait else None


def _start(name: str) -> str:
    shown = os.fsencode(name)[:_SHOWN].decode("utf-8", "ignore")
    return f".{shown}."


@cache
def _here() -> tuple[str, str, str]:
    """Host, machine and namespace of this process."""
    host = re.sub(r"[^\w.]", "_", socket.gethostname())[:40]
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text()
        space = f"{os.stat('/proc/self/ns/pid').st_ino:x}"
    except OSError:  # not Linux
        machine, space = host, "0"
    return host, hashlib.sha256(machine.encode()).hexdigest()[:8], space


def _writer(name: str) -> Writer | None:
    if found := _WRITER.search(name):
        return Writer(found["host"], found["machine"], found["space"], int(found["pid"]))
    if _EARLIER.fullmatch(name):
        return Writer(_here()[0] if f".{socket.gethostname()}-" in name else "", "", "", 0)
    return None


def _remove_if_dead(path: Path) -> None:
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(handle)
        own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        writer = _writer(path.name)
        if own and writer is not None and _is_dead(writer, status.st_mtime, locked(handle, wait=False)):
            shutil.rmtree(path.with_name(path.name + FOLDER_ENDING), ignore_errors=True)
            path.unlink()
    finally:
        os.close(handle)


def _is_dead(writer: Writer, written: float, free: bool | None) -> bool:
    """free: whether its file could be locked, None where nothing can be."""
    if free is False:
        return False
    host, machine, space = _here()
    if writer.machine == machine:
        # Processes of one kernel see each other's locks, in whatever container they are.
        return bool(free) or (writer.space == space and not _is_running(writer.pid))
    if writer.host == host and free and (not writer.machine or written < _boot_time()):
        return True
    return time.time() - written > _DAY


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _boot_time() -> float:
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else 0.0
