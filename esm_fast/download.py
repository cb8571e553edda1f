"""One file from the web, whole or not at all: one process at a time, resumed only where that is safe, then checked.

The file grows as NAME.part beside its place, with NAME.part.json telling what it is the beginning of: the address, the
length, and the server's validator (ETag or Last-Modified, RFC 9110). An interrupted download is resumed with If-Range,
so that a server whose file has changed sends the new one from its beginning.
"""

import http.client
import json
import os
import re
import shutil
import socket
import stat
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from .console import progress
from .files.atomic import sync

STALL_SECONDS = 30  # in which STALL_BYTES must come, or the download ends
STALL_BYTES = 32 << 10
_CHUNK = 1 << 20
_numbers = count()
_NEW = os.O_CREAT | os.O_EXCL


class DownloadError(OSError):
    """A download that was refused, stalled, broke off, or brought something else; the message says which."""


def fetch(url: str, target: Path, check: Callable[[Path], object] = lambda path: None) -> None:
    """Downloads `url` to `target`, unless a file is there already. Other processes that want it wait for this one.

    Args:
        url: https, or plain http from this machine itself.
        check: called with the complete file before it gets its name; what it raises discards the file.

    Raises:
        DownloadError, OSError. What came stays as target.part where the next call can resume it, and goes otherwise.
    """
    _require_secure(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target) as locked:
        if target.exists():  # another process was first
            return
        # Without locks two processes might write one part, so each gets its own, which nobody resumes.
        part = _Part(target.with_name(f"{target.name}.part" if locked else f"{target.name}.{_own_name()}.part"))
        try:
            _transfer(url, part, target.name)
        except BaseException:
            if not (locked and part.origin):
                part.discard()
            raise
        try:
            check(part.path)
        except Exception:  # it came as the server has it, and is not what was wanted
            part.discard()
            raise
        # Not by `files.atomic`: a part outlives its process, and its one name is how the next finds and resumes it.
        os.replace(part.path, target)
        sync(target.parent)
        part.discard()


def _own_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{next(_numbers)}"


@contextmanager
def _alone(target: Path) -> Iterator[bool]:
    """One process at a time for this target. False where the file system has no locks, or none may be made."""
    import filelock

    lock, locked = filelock.FileLock(f"{target}.lock"), True
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"waiting for another process, which downloads {target.name}", file=sys.stderr)
            lock.acquire()
    except (OSError, NotImplementedError):
        locked = False
    try:
        yield locked
    finally:
        if locked:
            lock.release()
            if target.exists():  # whoever waits for the lock finds it, and needs no lock any more
                with suppress(OSError):
                    os.unlink(lock.lock_file)


# --- the part -------------------------------------------------------------------------------------------------------


class _Origin(NamedTuple):
    """What a part is the beginning of."""

    url: str
    length: int
    validator: str  # for If-Range


class _Part:
    """The beginning of a file. Nothing is written through a link, or into a file that has another name too."""

    def __init__(self, path: Path):
        self.path, self.note = path, path.with_name(path.name + ".json")

    @property
    def origin(self) -> _Origin | None:
        """None where there is no part, or none that can be resumed."""
        try:
            state = self.path.lstat()
            origin = _Origin(**json.loads(_open(self.note, os.O_RDONLY, "rb").read()))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        types = [type(value) for value in origin] == [str, int, str]
        return origin if _is_own(state) and types and 0 < state.st_size <= origin.length else None

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def create(self, origin: _Origin | None):
        """An empty file to write to; without an origin, one that is not resumed."""
        self.discard()
        file = _open(self.path, os.O_WRONLY | _NEW, "wb")
        if origin is not None:
            with _open(self.note, os.O_WRONLY | _NEW, "w") as note:
                json.dump(origin._asdict(), note)
        return file

    def append(self):
        file = _open(self.path, os.O_WRONLY | os.O_APPEND, "ab")
        if not _is_own(os.fstat(file.fileno())):  # it was, a moment ago
            file.close()
            raise DownloadError(f"{self.path} was exchanged for a file that is not its own; remove it")
        return file

    def discard(self) -> None:
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def _is_own(state: os.stat_result) -> bool:
    """A plain file of this user under one name."""
    return stat.S_ISREG(state.st_mode) and state.st_nlink == 1 and state.st_uid == os.geteuid()


def _open(path: Path, flags: int, mode: str):
    safe = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # nor does it wait for who writes to a planted pipe
    return os.fdopen(os.open(path, flags | safe, 0o666), mode)


# --- the transfer ---------------------------------------------------------------------------------------------------


def _transfer(url: str, part: _Part, name: str) -> None:
    """Afterwards the part is as long as the server said."""
    begun = part.origin if part.origin and part.origin.url == url else None
    if begun is not None:
        have = part.size
        if have == begun.length:
            return
        with _reply(url, {"Range": f"bytes={have}-", "If-Range": begun.validator}) as reply:
            if reply.status == 200:
                return _from_start(reply, url, part, name)
            if _continues(reply, have, begun):
                with part.append() as file:
                    return _copy(reply, file, name, have, begun.length)
    with _reply(url, {}) as reply:
        _from_start(reply, url, part, name)


def _from_start(reply, url: str, part: _Part, name: str) -> None:
    if reply.status != 200:
        raise DownloadError(f"the server answers {reply.status} where the whole file was asked for")
    origin = _Origin(url, _length(reply), _validator(reply))
    if origin.length > (free := shutil.disk_usage(part.path.parent).free):
        raise DownloadError(f"it has {origin.length:,} bytes, and {part.path.parent} has {free:,} free")
    with part.create(origin if origin.validator else None) as file:
        _copy(reply, file, name, 0, origin.length)


def _continues(reply, have: int, begun: _Origin) -> bool:
    """Whether an answer is the rest of the very file that was begun."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", reply.headers.get("Content-Range", ""))
    if reply.status != 206 or found is None or _validator(reply) not in ("", begun.validator):
        return False
    return tuple(map(int, found.groups())) == (have, begun.length - 1, begun.length)


def _copy(reply, file, name: str, start: int, length: int) -> None:
    done, since, before = start, time.monotonic(), start
    with progress(length, "B", start, desc=name) as bar:
        while done < length and (piece := reply.read1(min(_CHUNK, length - done))):
            file.write(piece)
            done += len(piece)
            bar.update(len(piece))
            if time.monotonic() - since > STALL_SECONDS:
                if done - before < STALL_BYTES:
                    raise DownloadError(f"only {done - before} bytes came within {STALL_SECONDS} s")
                since, before = time.monotonic(), done
    file.flush()
    os.fsync(file.fileno())
    if done != length:
        raise DownloadError(f"the connection closed after {done} of {length} bytes")


def _length(reply) -> int:
    text = reply.headers.get("Content-Length", "")
    if not (text.isdecimal() and 0 < int(text) < 1 << 62):
        said = f"says {text!r}" if text else "does not say"
        raise DownloadError(f"the server {said} how many bytes the file has, so that its end could not be told")
    return int(text)


def _validator(reply) -> str:
    """A strong ETag or a date; "" where the server gives neither, and nothing can be resumed."""
    tag = reply.headers.get("ETag", "")
    return tag if tag.startswith('"') else reply.headers.get("Last-Modified", "")


# --- the connection -------------------------------------------------------------------------------------------------


@contextmanager
def _reply(url: str, headers: dict[str, str]):
    """The server's answer: 200, 206 or 416, and no web page. Whatever goes wrong is an OSError."""
    with _Watch() as watch:
        try:
            request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"} | headers)
            with _opened(request, watch) as reply:
                watch.cancel()  # from here on _copy watches
                watch.require_not_ended()
                if reply.status != 416:
                    _require_bytes(reply)
                yield reply
        except (http.client.HTTPException, ValueError) as error:
            watch.require_not_ended()
            raise DownloadError(f"the server's answer is no HTTP: {error!r}") from None
        except TimeoutError:
            raise DownloadError(f"nothing came within {STALL_SECONDS} s") from None


def _opened(request, watch: "_Watch"):
    try:
        return _opener(watch.connections).open(request, timeout=STALL_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # a range was asked for that is not there
            return error
        error.close()
        raise DownloadError(f"the server answers {error.code} {error.reason}") from None


class _Watch:
    """Ends the connections of a server whose header does not end: with a byte now and then no timeout ever comes."""

    def __init__(self):
        self.connections: list[http.client.HTTPConnection] = []
        self.ended = False

    def __enter__(self):
        self._timer = threading.Timer(STALL_SECONDS, self._end)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *_):
        self.cancel()

    def cancel(self) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.ended = True
        for connection in self.connections:
            with suppress(OSError, AttributeError):  # one without a socket yet, or any more
                connection.sock.shutdown(socket.SHUT_RDWR)

    def require_not_ended(self) -> None:
        if self.ended:
            raise DownloadError(f"the server did not answer within {STALL_SECONDS} s")


def _require_bytes(reply) -> None:
    kind = reply.headers.get_content_type()
    if kind in ("text/html", "application/xhtml+xml"):
        raise DownloadError("a web page came in the place of the file; does this network ask for a login?")
    encoding = reply.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise DownloadError(f"the server sends it encoded as {encoding!r}, which was not asked for")


def _opener(connections: list) -> urllib.request.OpenerDirector:
    """For http and https alone (urllib's own also opens ftp and files), which notes the connections it makes."""

    def noting(kind):
        def connect(*args, **kwargs):
            connections.append(kind(*args, **kwargs))
            return connections[-1]

        return connect

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(noting(http.client.HTTPConnection), request)

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(noting(http.client.HTTPSConnection), request, context=self._context)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        Plain(),
        Secure(),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(self, request, reply, code, message, headers, to):
        _require_secure(to, request.full_url)
        return super().redirect_request(request, reply, code, message, headers, to)


def _require_secure(url: str, origin: str | None = None) -> None:
    """https; or http to this machine itself, unless an address elsewhere leads there."""
    parts = urlsplit(url)
    at_home = parts.scheme == "http" and _is_this_machine(parts.hostname)
    if origin is not None:
        at_home = at_home and _is_this_machine(urlsplit(origin).hostname)
    if parts.scheme != "https" and not at_home:
        raise DownloadError(f"{url} is not https, and could be changed on its way")


def _is_this_machine(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host or "").is_loopback
    except ValueError:
        return False
