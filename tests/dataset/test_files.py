"""Files that are whole or absent: whoever writes at once, whatever stands there, wherever they are killed."""

import errno
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from esm_fast.files import partial
from esm_fast.files.atomic import alone, atomic, atomic_folder, committed, followed, remove_leftovers
from esm_fast.files.checked_json import DamagedError, read_json, write_json

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user or in another namespace")


# ---- whole or absent


def test_atomic_writes_all_or_nothing(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_atomic_syncs_the_file_before_its_name_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.path.realpath(f"/proc/self/fd/{fd}")), real_sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), real_replace(a, b)))
    with atomic(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert events == [str(temporary), "rename", str(tmp_path.resolve())]


def test_files_have_the_users_permissions_or_keep_their_own(tmp_path):
    (tmp_path / "plain").write_text("x")
    with atomic(tmp_path / "a") as temporary:
        temporary.write_text("x")
    with atomic(tmp_path / "b") as temporary:
        save_file({"x": torch.zeros(1)}, temporary)  # its own file, under its own name, for its owner alone
    with committed(tmp_path / "c") as output:
        output.write(b"x")
    assert len({(tmp_path / name).stat().st_mode for name in ("plain", "a", "b", "c")}) == 1
    (tmp_path / "a").chmod(0o600)
    with atomic(tmp_path / "a") as temporary:
        temporary.write_text("y")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "o") as folder:
        (folder / "x").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "o") as folder:
        (folder / "x").write_text("whole")
        assert not (tmp_path / "o").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["o"] and (tmp_path / "o/x").read_text() == "whole"
    with pytest.raises(FileExistsError, match="exists; choose another name"), atomic_folder(tmp_path / "o"):
        pass
    with pytest.raises(FileExistsError, match="meanwhile"), atomic_folder(tmp_path / "p"):
        (tmp_path / "p").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "p"]


def test_errors_name_the_file_that_the_user_knows(tmp_path, monkeypatch):
    path = tmp_path / "out"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError) as caught, committed(path) as output:
            output.write(b"x")
        assert caught.value.filename == str(path)
    with pytest.raises(OSError) as caught, committed(path):
        raise OSError(errno.EIO, "of the input")  # reading something else
    assert caught.value.filename is None
    with pytest.raises(OSError) as caught, atomic(path) as temporary:
        raise OSError(errno.EIO, "of the output", str(temporary))
    assert caught.value.filename == str(path)
    with pytest.raises(OSError) as caught, atomic(tmp_path / "nowhere" / "out"):
        pass
    assert caught.value.filename == str(tmp_path / "nowhere" / "out")


def test_names_of_any_length_and_kind(tmp_path):
    for name in ("x" * 255, "蛋" * 85, "[a]*?.h5", "-o", "a b\nc"):
        with atomic(tmp_path / name) as temporary:
            temporary.write_text(name)
        with atomic(tmp_path / name) as temporary:
            temporary.write_text(name)
        assert (tmp_path / name).read_text() == name


# ---- what stands there already


def test_links_stay_and_lead_to_what_was_written(tmp_path):
    (tmp_path / "far").mkdir()
    target, link, second = tmp_path / "far/target", tmp_path / "link", tmp_path / "second"
    link.symlink_to("far/target")
    second.symlink_to(link)
    for text in ("new", "again"):  # the first time they lead nowhere yet
        with atomic(second) as temporary:
            assert temporary.parent == target.parent  # a rename works on one file system only
            temporary.write_text(text)
        assert link.is_symlink() and second.is_symlink() and target.read_text() == text
    with committed(link) as output:
        output.write(b"committed")
    assert link.is_symlink() and target.read_text() == "committed"
    link.unlink()
    link.symlink_to("link")
    with pytest.raises(OSError), atomic(link):
        pass


def test_devices_and_pipes_stay_and_get_the_bytes(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    with atomic(pipe) as temporary:
        temporary.write_bytes(b"abc")
    reader.join(10)
    assert got == [b"abc"] and stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (tmp_path / "null", "/dev/null"):
        with atomic(path) as temporary:
            temporary.write_bytes(b"abc")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and (tmp_path / "null").is_symlink()
    with pytest.raises(OSError) as caught, atomic("/dev/full") as temporary:
        temporary.write_bytes(b"abc")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"


@needs_root
def test_links_that_others_planted_are_not_followed(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    victim, link = tmp_path / "victim", shared / "out"
    link.symlink_to(victim)
    os.lchown(link, 12345, 12345)
    for write in (atomic, committed):
        with pytest.raises(PermissionError, match="a link that another user put into a folder"), write(link):
            pass
    assert not victim.exists()
    os.lchown(link, os.geteuid(), 0)
    assert followed(link) == victim
    shared.chmod(0o755)  # where only its owner writes, links are the owner's matter
    os.lchown(link, 12345, 12345)
    assert followed(link) == victim


def test_a_planted_lock_is_not_followed(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), alone(tmp_path / "lock"):
        pass
    assert not (tmp_path / "victim").exists()


# ---- several at once

WRITER = """
import sys, time
from pathlib import Path
from esm_fast.files import partial
from esm_fast.files.atomic import atomic, committed
import os
name, folder, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
for i in range(rounds):
    with atomic(folder / name, durable=False) as temporary:
        with temporary.open("w") as file:
            for _ in range(50):
                file.write(name * 100)
                file.flush()
    with committed(folder / f"{name}.committed") as output:
        for _ in range(20):
            output.write(name.encode() * 100)
    assert (folder / name).read_text() == name * 5000, "another's bytes"
    assert (folder / f"{name}.committed").read_bytes() == name.encode() * 2000
print(os.getpid())
"""


def run_writers(folder, names, prefix=()):
    command = [*prefix, sys.executable, "-c", WRITER]
    writers = [
        subprocess.Popen([*command, name, str(folder), "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in names
    ]
    said = [writer.communicate(timeout=120) for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * len(names), said
    assert sorted(path.name for path in folder.iterdir()) == sorted(n + e for n in names for e in ("", ".committed"))
    return [int(out) for out, _ in said]


def test_writers_of_one_folder_do_not_meet(tmp_path):
    run_writers(tmp_path, ["a", "b", "c"])


@needs_root
def test_writers_with_equal_process_ids_do_not_meet(tmp_path):
    """As in containers, where every main process is number 1."""
    prefix = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    assert run_writers(tmp_path, ["a", "b"], prefix) == [1, 1]


def test_names_differ_even_where_host_process_and_time_are_the_same(tmp_path):
    made = [partial.new(tmp_path / "a") for _ in range(100)]
    assert len({path for path, _ in made}) == 100
    for _, handle in made:
        os.close(handle)


def test_a_name_that_is_there_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(partial.secrets, "token_hex", lambda size: "0" * 2 * size)
    path, handle = partial.new(tmp_path / "a")
    os.write(handle, b"ours")
    os.close(handle)  # and its lock with it, for which another would wait
    with pytest.raises(FileExistsError):
        partial.new(tmp_path / "a")
    assert path.read_bytes() == b"ours"


def test_writers_of_one_name_leave_one_of_theirs(tmp_path):
    threads = [threading.Thread(target=write_slowly, args=(tmp_path / "out", text)) for text in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "out").read_text() in {text * 3000 for text in "abcd"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def write_slowly(path, text):
    with atomic(path) as temporary, temporary.open("w") as file:
        for _ in range(30):
            file.write(text * 100)
            file.flush()
            time.sleep(0.002)


def test_without_replacing_the_first_stays(tmp_path):
    write_json(tmp_path / "a.json", {"of": 1}, replace=False)
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "a.json", {"of": 2}, replace=False)
    assert read_json(tmp_path / "a.json") == {"of": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_lock_without_waiting(tmp_path):
    with alone(tmp_path / "lock"), pytest.raises(BlockingIOError), alone(tmp_path / "lock", wait=False):
        pass
    with alone(tmp_path / "lock", wait=False):
        pass


# ---- what is left

KILLED = """
import sys, time, os, signal
from pathlib import Path
from esm_fast.files.atomic import atomic, atomic_folder, committed
how, path = sys.argv[1:]
with {"atomic": atomic, "committed": committed, "folder": atomic_folder}[how](Path(path)) as made:
    if how == "folder":
        (made / "x").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["atomic", "committed", "folder"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_the_next_run_removes_what_a_dead_one_left_and_nothing_of_a_living_one(tmp_path, how, number):
    path = tmp_path / "out"
    writers = [
        subprocess.Popen([sys.executable, "-c", KILLED, how, str(path)], stdout=subprocess.PIPE) for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"writing\n"
    assert len(list(tmp_path.glob(".*.partial"))) == 2
    writers[0].send_signal(number)
    assert writers[0].wait() == -number
    remove_leftovers(tmp_path, "out")
    (left,) = tmp_path.glob(".*.partial")
    assert f"-{writers[1].pid}-" in left.name and len(list(tmp_path.iterdir())) == 1 + (how == "folder")
    writers[1].send_signal(number)
    writers[1].wait()
    with atomic(tmp_path / "other") as temporary:  # of another name: not its matter
        temporary.touch()
    assert left.exists()
    with {"atomic": atomic, "committed": atomic, "folder": atomic_folder}[how](path) as made:
        if how != "folder":
            made.write_text("whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def left_by(folder, *, host=None, machine=None, space=None, pid=1, age=0.0):
    here = partial._here()
    writer = (host or here[0], machine or here[1], space or here[2], pid)
    path = folder / ".out.{}-{}-{}-{}-0a1b2c3d.partial".format(*writer)
    path.write_bytes(b"x")
    os.utime(path, (time.time() - age,) * 2)
    return path


def dead_pid():
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


DAY = 24 * 3600.0


@pytest.mark.parametrize(
    ("where", "locks", "goes"),
    [
        (dict(pid=1), True, True),  # as here, where the lock decides
        (dict(pid=1), False, False),  # a process of this number runs
        (dict(pid=None), False, True),  # none does
        (dict(space="abc"), True, True),  # a container of this machine
        (dict(space="abc"), False, False),
        (dict(machine="0" * 8, host="elsewhere"), True, False),
        (dict(machine="0" * 8), True, False),  # another machine may have this one's name
        (dict(machine="0" * 8, age=1e9), True, True),
        (dict(machine="0" * 8, host="elsewhere", age=DAY + 1), False, True),
    ],
)
def test_what_may_be_alive_stays(tmp_path, monkeypatch, where, locks, goes):
    if where.get("pid", 1) is None:
        where = {**where, "pid": dead_pid()}
    path = left_by(tmp_path, **where)
    if not locks:
        monkeypatch.setattr(fcntl, "flock", without_locks)
    monkeypatch.setattr(partial, "_boot_time", lambda: time.time() - 3600)
    remove_leftovers(tmp_path)
    assert path.exists() != goes


def without_locks(*_):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def test_without_locks_everything_works(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    with alone(tmp_path / "lock"), atomic(tmp_path / "a") as temporary:
        temporary.write_text("x")
        remove_leftovers(tmp_path)
        assert temporary.exists()
    with committed(tmp_path / "b") as output:
        output.write(b"x")
        remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "lock"]


def test_what_is_no_partial_file_of_ours_stays(tmp_path):
    here = socket.gethostname()
    names = [".out.partial", ".notes.partial", f".out.{here}-x-1.partial", "out.partial"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / left_by(tmp_path).name.replace("-1-", "-2-")).mkdir()
    link = tmp_path / left_by(tmp_path).name.replace("-1-", "-3-")
    link.symlink_to(tmp_path / "out.partial")
    remove_leftovers(tmp_path)
    assert all((tmp_path / name).exists() for name in names) and link.is_symlink()
    assert not left_by(tmp_path).with_name("x").exists()


@needs_root
def test_other_users_files_stay(tmp_path):
    path = left_by(tmp_path)
    os.chown(path, 12345, 12345)
    remove_leftovers(tmp_path)
    assert path.exists()


def test_json_files_know_their_own_bytes(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2], "b": "text"})
    assert read_json(path) == {"a": [1, 2], "b": "text"}
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedError, match="x.json is damaged"):
            read_json(path)
