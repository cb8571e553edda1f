"""Downloads from a server on this machine: whole, resumed, at once, or refused with nothing left behind."""

import errno
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest
from web import serving

from esm_fast import download
from esm_fast.download import DownloadError, fetch

BODY = random.Random(0).randbytes(1_280_000)


@pytest.fixture
def server():
    with serving() as (handler, address):
        handler.files["/f"] = BODY
        handler.address = f"{address}/f"
        yield handler


@pytest.fixture
def target(tmp_path):
    return tmp_path / "sub" / "f.pt"


def left(target):
    return sorted(path.name for path in target.parent.iterdir()) if target.parent.exists() else []


# --- whole and resumed ----------------------------------------------------------------------------------------------


def interrupted(server, target):
    server.cut = 700_000
    with pytest.raises(DownloadError, match="closed after .* of 1280000 bytes"):
        fetch(server.address, target)
    server.cut = None
    server.requests.clear()


def test_an_interrupted_download_is_resumed_under_its_validator(server, target):
    interrupted(server, target)
    size = target.with_name("f.pt.part").stat().st_size
    assert not target.exists() and 0 < size <= 700_000
    fetch(server.address, target)
    assert target.read_bytes() == BODY and left(target) == ["f.pt"]
    assert server.requests == [(f"bytes={size}-", '"1"')]


@pytest.mark.parametrize("change", ["tag", "length", "no_ranges"])
def test_a_file_that_changed_is_sent_anew(server, target, change):
    interrupted(server, target)
    server.files["/f"] = other = BODY[::-1] if change != "length" else BODY[:900_000]
    if change == "no_ranges":
        server.ranges = False
    else:
        server.tag = '"2"'
    fetch(server.address, target)
    assert target.read_bytes() == other and left(target) == ["f.pt"]


@pytest.mark.parametrize("wrong", ["start", "whole", "tag", "none", "416"])
def test_a_range_that_does_not_fit_is_not_joined(server, target, wrong):
    """A server that answers 206 with another range, length or file: all is asked for again."""
    interrupted(server, target)

    def answer(handler, body):
        if handler.headers.get("Range") is None:
            return handler.answer(200, body, 0, len(body))
        if wrong == "416":
            return handler.send_error(416)
        start = int(handler.headers["Range"][6:-1])
        ranges = {
            "start": f"bytes 0-{len(body) - 1}/{len(body)}",
            "whole": f"bytes {start}-{len(body)}/{len(body) + 1}",
        }
        fields = {"ETag": '"2"'} if wrong == "tag" else {"Content_Range": ranges.get(wrong)}
        handler.answer(206, body[::-1][start:], start, len(body), **fields)

    server.misbehaviour = answer
    fetch(server.address, target)
    assert target.read_bytes() == BODY and left(target) == ["f.pt"]


def test_without_a_validator_nothing_is_resumed(server, target):
    server.tag = None
    interrupted(server, target)
    assert left(target) == ["f.pt.lock"]
    fetch(server.address, target)
    assert target.read_bytes() == BODY and server.requests == [(None, None)]


@pytest.mark.parametrize("note", [None, b"", b"[]", b'{"url": 1}', b"[" * 100_000, "other", "long"])
def test_a_part_of_unknown_origin_is_thrown_away(server, target, note):
    """As versions before this one left them, or damaged, or of another address."""
    interrupted(server, target)
    story = target.with_name("f.pt.part.json")
    if note is None:
        story.unlink()
    elif isinstance(note, bytes):
        story.write_bytes(note)
    else:
        content = json.loads(story.read_text())
        content["url" if note == "other" else "length"] = "http://127.0.0.1/" if note == "other" else 10
        story.write_text(json.dumps(content))
    target.with_name("f.pt.part").write_bytes(b"wrong" * 1000)
    fetch(server.address, target)
    assert target.read_bytes() == BODY and server.requests == [(None, None)]


def test_a_complete_part_is_not_asked_for_again(server, target):
    """As one is left by an interrupt between the last byte and the name."""

    def interrupt(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server.address, target, interrupt)
    server.requests.clear()
    fetch(server.address, target)
    assert target.read_bytes() == BODY and server.requests == [] and left(target) == ["f.pt"]


def test_what_the_check_refuses_is_gone(server, target):
    def check(path):
        assert path.read_bytes() == BODY and not target.exists()
        raise ValueError("no checkpoint")

    with pytest.raises(ValueError, match="no checkpoint"):
        fetch(server.address, target, check)
    assert left(target) == ["f.pt.lock"]


def test_a_file_that_is_there_is_left_alone(server, target):
    target.parent.mkdir()
    target.write_bytes(b"mine")
    fetch(server.address, target)
    assert target.read_bytes() == b"mine" and server.requests == []


# --- refused --------------------------------------------------------------------------------------------------------

PAGE = b"<html>please log in</html>"


def redirect(to):
    def answer(handler, body):
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.end_headers()

    return answer


def reply(body=None, **headers):
    return lambda handler, file: handler.answer(200, file if body is None else body, 0, len(file), **headers)


MISBEHAVIOURS = {
    "cut_without_length": (
        lambda h, body: h.answer(200, body[:99], 0, 0, Content_Length=None),
        "does not say how many",
    ),
    "chunked": (reply(Content_Length=None, Transfer_Encoding="chunked"), "does not say how many"),
    "negative_length": (reply(Content_Length="-5"), "says '-5'"),
    "no_number": (reply(Content_Length="abc"), "says 'abc'"),
    "empty": (reply(b"", Content_Length="0"), "says '0'"),
    "larger_than_the_disk": (reply(Content_Length=str(1 << 60)), "free"),
    "too_short": (reply(Content_Length="2000000"), "closed after 1280000 of 2000000"),
    "page": (reply(PAGE, Content_Type="text/html; charset=utf-8", Content_Length=str(len(PAGE))), "web page"),
    "encoded": (reply(Content_Encoding="gzip"), "encoded as 'gzip'"),
    "always_416": (lambda h, body: h.send_error(416), "answers 416"),
    "not_found": (lambda h, body: h.send_error(404), "answers 404"),
    "part_unasked": (lambda h, body: h.answer(206, body, 0, len(body)), "answers 206"),
    "to_a_file": (redirect("file:///etc/passwd"), "not allowed"),
    "to_ftp": (redirect("ftp://127.0.0.1:1/x"), "not https"),
    "to_http_elsewhere": (redirect("http://192.0.2.1/x"), "not https"),
    "to_data": (redirect("data:,x"), "not allowed"),
    "in_a_circle": (redirect("/f"), "answers 302"),
    "no_http": (lambda h, body: h.wfile.write(b"SSH-2.0-OpenSSH\r\n"), "no HTTP|answers"),
    "silence": (lambda h, body: None, ""),
}


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_what_is_not_the_file_leaves_nothing_behind(server, target, name):
    server.misbehaviour, message = MISBEHAVIOURS[name]
    server.tag = None
    with pytest.raises(OSError, match=message):
        fetch(server.address, target)
    assert left(target) == ["f.pt.lock"]
    server.misbehaviour = None  # and it does no harm to the next one
    fetch(server.address, target)
    assert target.read_bytes() == BODY


@pytest.mark.parametrize(
    "url", ["http://example.org/f", "ftp://example.org/f", "file:///etc/passwd", "http://[::2]/f", "f"]
)
def test_only_https_is_used(url, target):
    with pytest.raises(DownloadError, match="not https"):
        fetch(url, target)
    assert not target.parent.exists()


def trickle_body(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    trickle(handler, body)


def trickle(handler, body):
    for at in range(100):
        handler.wfile.write(body[at : at + 1])
        handler.wfile.flush()
        time.sleep(0.1)


def trickle_header(handler, body):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
    trickle(handler, b"x" * 100)


def hang(handler, body):
    time.sleep(10)


@pytest.mark.parametrize("misbehaviour", [trickle_body, trickle_header, hang])
def test_a_stalled_download_ends(server, target, monkeypatch, misbehaviour):
    """A byte now and then keeps every timeout of a socket from coming."""
    monkeypatch.setattr(download, "STALL_SECONDS", 1)
    server.misbehaviour = misbehaviour
    begin = time.monotonic()
    with pytest.raises(DownloadError, match="within 1 s"):
        fetch(server.address, target)
    assert time.monotonic() - begin < 6 and not target.exists()


# --- several at once ------------------------------------------------------------------------------------------------

CODE = "import sys, pathlib; from esm_fast.download import fetch; fetch(sys.argv[1], pathlib.Path(sys.argv[2]))"


@pytest.mark.parametrize("killed", [False, True])
def test_several_processes_download_once(server, target, killed):
    """Even when the one that downloads is killed: the next resumes what it left."""
    server.delay = 0.05
    command = [sys.executable, "-c", CODE, server.address, str(target)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    if killed:
        part = target.with_name("f.pt.part")
        while not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
        time.sleep(0.2)
        processes += [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        owner = next(process for process in processes if _writes(process.pid, part))
        owner.kill()
        processes.remove(owner)
        owner.communicate()
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    assert target.read_bytes() == BODY and left(target) == ["f.pt"]
    assert len(server.requests) == 1 + killed and (server.requests[-1][0] is not None) == killed


def _writes(pid, path):
    try:
        return any(os.path.realpath(f"/proc/{pid}/fd/{fd}") == str(path) for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(server, target, monkeypatch, number):
    """Each process has a part of its own there; whoever is last leaves a whole file too."""
    import fcntl

    def no_lock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    server.delay = 0.02
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch(server.address, target))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [None, None] and target.read_bytes() == BODY
    assert not [name for name in left(target) if ".part" in name]


# --- planted files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["symlink", "dangling", "hard_link", "fifo", "folder"])
@pytest.mark.parametrize("name", ["f.pt.part", "f.pt.part.json"])
def test_nothing_is_written_through_what_others_planted(server, target, tmp_path, kind, name):
    interrupted(server, target)
    server.cut = None
    precious, planted = tmp_path / "precious", target.with_name(name)
    precious.write_bytes(b"precious" * 1000)
    planted.unlink(missing_ok=True)
    if kind in ("symlink", "dangling"):
        planted.symlink_to(precious if kind == "symlink" else tmp_path / "new")
    elif kind == "hard_link":
        os.link(precious, planted)
    elif kind == "fifo":
        os.mkfifo(planted)
    else:
        planted.mkdir()
    if kind == "folder":
        with pytest.raises(OSError):
            fetch(server.address, target)
        assert not target.exists()
    else:
        fetch(server.address, target)
        assert target.read_bytes() == BODY
    assert precious.read_bytes() == b"precious" * 1000 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["f.pt.part", "f.pt.part.json"])
@pytest.mark.parametrize("resumed", [False, True])
def test_what_is_planted_at_the_last_moment_is_not_written_to(server, target, tmp_path, monkeypatch, name, resumed):
    """Between the look at a name and its opening: only an exclusive open, and a look at what was opened, see it."""
    if resumed:
        interrupted(server, target)
    precious, done = tmp_path / "precious", []
    precious.write_bytes(b"precious" * 1000)
    open_before = download._open

    def planting(path, flags, mode):
        if path.name == name and flags & os.O_WRONLY and not done:
            path.unlink(missing_ok=True)
            os.link(precious, path)
            done.append(path)
        return open_before(path, flags, mode)

    monkeypatch.setattr(download, "_open", planting)
    if resumed and name.endswith(".json"):  # which is only read
        fetch(server.address, target)
    else:
        with pytest.raises(OSError, match="exists|not its own"):
            fetch(server.address, target)
        assert done and not target.exists()
    assert precious.read_bytes() == b"precious" * 1000


def test_the_lock_follows_no_link(server, target, tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    target.parent.mkdir()
    target.with_name("f.pt.lock").symlink_to(precious)
    fetch(server.address, target)
    assert precious.read_bytes() == b"precious" and target.read_bytes() == BODY
