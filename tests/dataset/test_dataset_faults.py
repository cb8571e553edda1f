"""Data sets under faults: killed, out of disk, out of memory, damaged, stopped, twice at once. Nothing is lost."""

import errno
import fcntl
import gzip
import os
import random
import shutil
import signal
import socket
import threading
import time

import numpy as np
import pytest
import torch

from esm_fast.cli import main

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from embedded import MIXED, contents, fasta_of, pooled, proteins, read

from esm_fast.dataset import verify
from esm_fast.dataset.errors import DatasetError
from esm_fast.dataset.plan import load
from esm_fast.inference import stream
from esm_fast.inference.outputs.pooled import Mean

FASTA = fasta_of(proteins(9, seed=2)) + MIXED
# The quick numbers are for every day; ESM_FAST_FAULTS=200 kills at every single step and 200 times more, and flips
# five times as many bits.
FAULTS = int(os.environ.get("ESM_FAST_FAULTS", 0))
OPTIONS = ["--unit-residues", 150, "--residues", "--unknown", "skip", "--empty", "skip"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "in.fasta"
    path.write_text(FASTA)
    return path


@pytest.fixture(scope="module")
def command(source, fair_checkpoint):
    """The arguments for an output folder."""

    def arguments(out, *more, fasta=source):
        return [str(a) for a in ["embed", fasta, "-o", out, "--model", fair_checkpoint, *OPTIONS, *more]]

    return arguments


@pytest.fixture(scope="module")
def clean(command, tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("clean") / "out"
    assert main(command(out)) == 0
    return out


def is_sound(out):
    """Complete, and no partial file left."""
    assert not verify.verify(out)[1].problems
    assert not list(out.rglob("*.partial"))


# ---- killed


def calls_of(monkeypatch, command, out, function):
    """How often an undisturbed run calls a function of os."""
    real, calls = getattr(os, function), []
    with monkeypatch.context() as patch:
        patch.setattr(os, function, lambda *a, **k: (calls.append(1), real(*a, **k))[1])
        assert main(command(out)) == 0
    return len(calls)


@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
def test_killed_at_every_step_it_goes_on_to_the_same_bytes(forks, command, clean, tmp_path, monkeypatch, function):
    """kill -9 before or after the rename of every file, and at a spread of the others."""
    count = calls_of(monkeypatch, command, tmp_path / "count", function)
    wanted = contents(clean)
    step = 1 if FAULTS or function == "replace" else max(1, count // 2)
    for at in range(1, count + 1, step):
        out = tmp_path / f"{function}-{at}"
        how = "kill before" if at % 2 else "kill after"
        assert forks.run(command(out), patch=function, at=at, how=how) == -signal.SIGKILL
        assert contents(out).items() <= wanted.items()
        assert forks.run(command(out)) == 0
        assert contents(out) == wanted
        assert not list(out.rglob("*.partial"))


def test_killed_at_random_times_it_goes_on_to_the_same_bytes(forks, command, clean, tmp_path):
    rng, wanted, kills, runs = random.Random(11), contents(clean), 0, 0
    while kills < (FAULTS or 4):
        out, runs = tmp_path / f"run-{runs}", runs + 1
        assert runs < 5 * (FAULTS or 4), "most runs end before they are killed"
        pid = forks.start(command(out))
        time.sleep(rng.uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL)
        kills += forks.wait(pid) == -signal.SIGKILL
        assert forks.run(command(out)) == 0
        assert contents(out) == wanted


# ---- no disk, a bad disk


@pytest.mark.parametrize(
    ("function", "number"),
    [("open", errno.EROFS), ("write", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EDQUOT)],
)
def test_every_failing_call_is_an_error_and_commits_nothing_half(
    command, clean, tmp_path, monkeypatch, capsys, function, number
):
    count = calls_of(monkeypatch, command, tmp_path / "count", function)
    wanted, real = contents(clean), getattr(os, function)
    for at in range(1, count + 1, 1 if FAULTS else max(1, count // 7)):
        out, calls = tmp_path / f"o{at}", []

        def failing(*arguments, at=at, calls=calls, **options):
            calls.append(1)
            if len(calls) == at:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing)
            assert main(command(out)) == 1
        error = capsys.readouterr().err
        assert os.strerror(number) in error and "Traceback" not in error
        assert contents(out).items() <= wanted.items()
        assert not list(out.rglob("*.partial"))
    assert main(command(out)) == 0
    assert contents(out) == wanted


def test_short_writes_are_completed(command, clean, tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[: max(1, len(data) // 2)]))
    assert main(command(tmp_path / "o")) == 0
    monkeypatch.undo()
    assert contents(tmp_path / "o") == contents(clean)


def test_a_disk_that_gives_back_other_bytes_is_noticed(command, tmp_path, monkeypatch, capsys):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data[:-1]) + b"?"))
    assert main(command(tmp_path / "o")) == 1
    assert "the disk gave back other bytes" in capsys.readouterr().err


def test_a_file_is_on_the_disk_before_it_has_its_name(command, tmp_path, monkeypatch):
    """fsync of the file, its rename, fsync of its folder: in this order, for every file."""
    events = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(handle):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def noting_replace(source, target):
        events.append(("rename", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    assert main(command(tmp_path / "o")) == 0
    renames = [i for i, event in enumerate(events) if event[0] == "rename"]
    assert len(renames) == len(contents(tmp_path / "o"))
    for i in renames:
        _, temporary, target = events[i]
        assert ("fsync", temporary) in events[:i]
        assert ("fsync", os.path.dirname(target)) in events[i:]


# ---- damage


def flipped_is_found(out, path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
        problems = verify.verify(out)[1].problems
    except DatasetError as error:
        problems = [str(error)]
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return any(path.name in problem for problem in problems)


def test_every_flipped_bit_is_found(command, tmp_path):
    out = tmp_path / "o"
    assert main(command(out)) == 0
    rng = random.Random(4)
    paths = [out / name for name in contents(out)]
    for _ in range(5 * FAULTS or 60):
        path = rng.choice(paths)
        bit = rng.randrange(8 * path.stat().st_size)
        assert flipped_is_found(out, path, bit), (path, bit)
    is_sound(out)


def test_every_flipped_bit_of_a_shard_is_found_before_run_json_is_there(command, tmp_path):
    """Pages have checksums, a pooled table its canonical bytes, and residues a checksum in the pooled table."""
    out, rng = tmp_path / "o", random.Random(5)
    assert main(command(out)) == 0
    (out / "run.json").unlink()
    for _ in range(5 * FAULTS or 60):
        path = rng.choice([*(out / "residues").iterdir(), *(out / "pooled").iterdir()])
        bit = rng.randrange(8 * path.stat().st_size)
        assert flipped_is_found(out, path, bit), (path, bit)


@pytest.mark.parametrize("name", ["plan.json", "ids.parquet", "pooled/part-000001.parquet", "run.json"])
@pytest.mark.parametrize("how", ["removed", "cut", "emptied"])
def test_verify_and_finish_name_what_is_wrong(command, clean, tmp_path, capsys, name, how):
    out = tmp_path / "o"
    shutil.copytree(clean, out)
    data = (out / name).read_bytes()
    (out / name).unlink()
    if how != "removed":
        (out / name).write_bytes(data[: len(data) // 2 if how == "cut" else 0])
    for tool in ("verify", "finish"):
        if (name, how) == ("run.json", "removed"):
            assert main([tool, str(out)]) == 0
            continue
        assert main([tool, str(out)]) == 1
        assert name.split("/")[-1] in capsys.readouterr().err
    (out / name).unlink(missing_ok=True)  # as the message advises
    assert main(command(out)) == 0
    assert contents(out) == contents(clean)


def test_a_unit_that_cannot_be_read_is_computed_again(command, clean, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(clean, out)
    for path in [*(out / "pooled").iterdir(), *(out / "residues").iterdir()]:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    assert main(command(out)) == 0
    assert contents(out) == contents(clean)


def test_shards_of_another_plan_are_left_alone(command, clean, tmp_path, capsys):
    out = tmp_path / "o"
    shutil.copytree(clean, out)
    (out / "plan.json").unlink()
    before = contents(out)
    assert main(command(out, "--store", "float16")) == 1
    assert "holds the shards of another plan" in capsys.readouterr().err
    assert contents(out) == before


def test_files_that_do_not_belong_are_named(clean, tmp_path, capsys):
    out = tmp_path / "o"
    shutil.copytree(clean, out)
    shutil.copy(out / "pooled/part-000000.parquet", out / "pooled/part-000099.parquet")
    assert main(["verify", str(out)]) == 1
    assert "part-000099.parquet is no part of this data set" in capsys.readouterr().err
    shutil.copy(out / "pooled/part-000000.parquet", out / "pooled/part-000001.parquet")
    assert main(["verify", str(out)]) == 1
    assert "part-000001.parquet is damaged: its SHA-256" in capsys.readouterr().err
    (out / "run.json").unlink()
    assert main(["verify", str(out)]) == 1
    assert "part-000001.parquet belongs to another plan or unit" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_cut_input_is_refused_and_commits_nothing(command, tmp_path, capsys, share):
    data = gzip.compress(FASTA.encode())
    (tmp_path / "in.gz").write_bytes(data[: int(share * len(data))])
    assert main(command(tmp_path / "o", fasta=tmp_path / "in.gz")) == 1
    assert "in.gz: the gz stream is cut short" in capsys.readouterr().err
    assert contents(tmp_path / "o") == {}


# ---- twice at once


def test_four_processes_make_the_bytes_of_one(forks, command, clean, tmp_path):
    out = tmp_path / "o"
    pids = [forks.start(command(out, "--shard", f"{i}/4")) for i in range(4)]
    assert [forks.wait(pid) for pid in pids] == [0] * 4
    assert forks.run(["finish", out]) == 0
    assert contents(out) == contents(clean)
    is_sound(out)


def test_two_processes_on_the_same_units_do_no_harm(forks, command, clean, tmp_path):
    out = tmp_path / "o"
    pids = [forks.start(command(out)) for _ in range(3)]
    assert [forks.wait(pid) for pid in pids] == [0] * 3
    assert contents(out) == contents(clean)


def test_without_locks_the_plan_that_was_first_stays(command, clean, tmp_path, monkeypatch, capsys):
    """Two processes plan at once, as they do on a file system without locks; the other one is first."""
    from esm_fast.dataset import planner

    def without_locks(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    out, real, calls = tmp_path / "o", planner._texts, []

    def texts(tokens):
        calls.append(1)
        if len(calls) == 1:
            assert main(command(out)) == 0
        return real(tokens)

    monkeypatch.setattr(fcntl, "flock", without_locks)
    monkeypatch.setattr(planner, "_texts", texts)
    assert main(command(out, "--store", "float16")) == 1
    assert "holds the shards of another plan" in capsys.readouterr().err
    assert contents(out) == contents(clean)
    calls.clear()
    out = tmp_path / "same"
    assert main(command(out)) == 0
    assert contents(out) == contents(clean)


def test_a_partial_file_goes_only_when_its_writer_is_dead(command, clean, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(clean, out)
    here = socket.gethostname()
    names = [
        f".part-000000.parquet.{name}-0.partial" for name in (f"{here}-1", f"{here}-2", "elsewhere-1", "elsewhere-2")
    ]
    dead, living, elsewhere, old = (out / "pooled" / name for name in names)
    for path in (dead, elsewhere, old):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(command(out)) == 0
    assert living.exists() and elsewhere.exists() and not dead.exists() and not old.exists()


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_it_between_batches_and_it_goes_on(command, clean, tmp_path, monkeypatch, capsys, number):
    out, real, calls = tmp_path / "o", stream._forward, []

    def forward(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(stream, "_forward", forward)
    assert main(command(out)) == 75
    assert "the same command resumes" in capsys.readouterr().err
    done = {name for name in contents(out) if name.startswith("pooled")}
    assert done == {"pooled/part-000000.parquet"}
    assert not list(out.rglob("*.partial"))
    assert main(command(out)) == 0
    assert contents(out) == contents(clean)
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_signal_while_the_input_is_read(command, tmp_path, monkeypatch):
    from esm_fast.dataset import planner

    monkeypatch.setattr(
        planner, "_texts", lambda t, real=planner._texts: (os.kill(os.getpid(), signal.SIGTERM), real(t))[1]
    )
    assert main(command(tmp_path / "o")) == 75
    assert contents(tmp_path / "o") == {}


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGUSR1], [signal.SIGTERM] * 2])
def test_signals_at_random_times_end_it_in_order_and_it_goes_on(forks, command, clean, tmp_path, numbers):
    rng, wanted = random.Random(7), contents(clean)
    ends = {0, 75, 128 + numbers[0], -numbers[0]}  # the last two for a second one, or for one after the work is done
    for run in range(FAULTS // 4 or 1):
        out, log = tmp_path / f"run-{run}", tmp_path / f"log-{run}"
        pid = forks.start(command(out), log=log)
        until = time.monotonic() + 60
        while not out.exists() and time.monotonic() < until:
            time.sleep(0.002)
        for number in numbers:
            time.sleep(rng.uniform(0, 0.2 / len(numbers)))
            os.kill(pid, number)
        assert forks.wait(pid) in ends
        assert "Traceback" not in log.read_text()
        assert forks.run(command(out)) == 0
        assert contents(out) == wanted


def test_two_interrupts_from_the_keyboard(command, clean, tmp_path, monkeypatch, capsys):
    """The second comes while the first waits for the thread that writes, or, where it does not wait, not at all."""
    real, calls, over = os.fsync, [], threading.Event()

    def fsync(handle):
        if threading.current_thread() is not threading.main_thread() and not calls:
            calls.append(1)
            for _ in range(2):
                if not over.is_set():
                    os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    code = main(command(tmp_path / "o"))
    over.set()
    assert code == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    for thread in threading.enumerate():
        if thread.name.startswith("write"):
            thread.join()
    assert calls and contents(tmp_path / "o").items() <= contents(clean).items()
    assert main(command(tmp_path / "o")) == 0
    assert contents(tmp_path / "o") == contents(clean)


# ---- memory, and numbers that are none


def memory_for(limit, monkeypatch, error):
    """Batches of more than `limit` tokens find no memory."""

    def forward(model, batch, *rest, real=stream._forward):
        if len(batch.tokens) > limit:
            raise error
        return real(model, batch, *rest)

    monkeypatch.setattr(stream, "_forward", forward)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")],
)
def test_batches_become_smaller_until_they_fit(command, clean, tmp_path, monkeypatch, error):
    longest = max(row["length"] for row in read(clean / "sequences.parquet"))
    memory_for(longest + 2, monkeypatch, error)
    assert main(command(tmp_path / "o")) == 0
    assert contents(tmp_path / "o") == contents(clean)


def test_a_protein_that_fits_into_no_memory_is_named(command, tmp_path, monkeypatch, capsys):
    memory_for(40, monkeypatch, torch.OutOfMemoryError("full"))
    assert main(command(tmp_path / "o")) == 3
    rows = pooled(tmp_path / "o")
    failed = [row for row in rows if row["length"] > 38]
    assert failed and all(row["status"] == "out of memory" and row["layer_3"] is None for row in failed)
    assert all(row["status"] == "ok" for row in rows if row not in failed)
    assert f"failed    {len(failed)} out of memory" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "o")]) == 3


def test_numbers_that_are_not_finite_are_computed_again_in_float32(command, tmp_path, monkeypatch):
    assert main(command(tmp_path / "exact", "--dtype", "float32")) == 0

    def pooled_rows(output, given, batch, real=Mean.reduce):
        made = real(output, given, batch)
        if given.model.dtype == torch.bfloat16:
            made[0][:] = np.inf
        return made

    monkeypatch.setattr(Mean, "reduce", pooled_rows)
    assert main(command(tmp_path / "o", "--dtype", "bfloat16")) == 0
    rows, exact = pooled(tmp_path / "o"), pooled(tmp_path / "exact")
    again = [i for i, row in enumerate(rows) if row["status"] == "float32"]
    assert again and all(row["status"] in ("ok", "float32") for row in rows)
    for i in again:
        np.testing.assert_allclose(rows[i]["layer_3"], exact[i]["layer_3"], rtol=0, atol=1e-5)


def test_numbers_that_stay_infinite_are_named(command, tmp_path, monkeypatch, capsys):
    def pooled_rows(*where, real=Mean.reduce):
        made = real(*where)
        made[-1][..., 3] = np.nan
        return made

    monkeypatch.setattr(Mean, "reduce", pooled_rows)
    assert main(command(tmp_path / "o")) == 3
    assert "not finite" in capsys.readouterr().err
    rows = pooled(tmp_path / "o")
    assert {row["status"] for row in rows} == {"ok", "not finite"}
    assert all((row["layer_3"] is None) == (row["status"] != "ok") for row in rows)
    assert main(command(tmp_path / "o")) == 3  # nothing is left to do, and it says so again


def test_numbers_too_large_for_float16_are_named(command, tmp_path, monkeypatch):
    monkeypatch.setattr(Mean, "reduce", lambda *where, real=Mean.reduce: [rows + 1e6 for rows in real(*where)])
    assert main(command(tmp_path / "o", "--store", "float16")) == 3
    assert {row["status"] for row in pooled(tmp_path / "o")} == {"too large for float16"}


def test_an_error_of_the_model_is_not_hidden(command, tmp_path, monkeypatch, capsys):
    memory_for(0, monkeypatch, RuntimeError("something else"))
    assert main(command(tmp_path / "o")) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said and "RuntimeError: something else" in said and "please report it" in said
    assert not list((tmp_path / "o" / "pooled").iterdir())
    assert load(tmp_path / "o").units  # the plan stays
