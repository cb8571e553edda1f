"""esm-fast submit on a SLURM of this machine, of one node: what stops a job, and what follows when all have ended."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from esm_fast.cli import main

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("submitit", reason="submitit is not installed")

import slurm
from embedded import contents, fasta_of, proteins

if reason := slurm.missing():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    with slurm.Cluster(tmp_path / "cluster") as started:
        monkeypatch.setenv("SLURM_CONF", started.environment["SLURM_CONF"])
        yield started


def submitted(capsys, command) -> tuple[str, str]:
    """The numbers of the array and of the job that follows."""
    assert main(["submit", "--nodes", "2", "--cpus", "1", "--hours", "0.1", *command]) == 0
    said = capsys.readouterr().out
    return re.search(r"jobs +(\d+)_0 \1_1\n", said)[1], re.search(r"finish +(\d+), when", said)[1]


def units(log) -> list[int]:
    """Those that are committed; with two jobs, the even ones are the first one's."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [event["unit"] for event in map(json.loads, lines) if event["event"] == "unit"]


def worker(array: str, task: int) -> int | None:
    """The process that makes a task's share, if it is there."""
    wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}", "SLURM_PROCID=0"}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((process / "environ").read_bytes().decode(errors="replace").split("\0"))
            if wanted <= environment and b"submitit" in (process / "cmdline").read_bytes():
                return int(process.name)
        except OSError:  # it has ended, or is not ours
            continue
    return None


def until(ready, seconds=180):
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_jobs_that_reach_their_limit_are_requeued_or_fail(cluster, fair_checkpoint, tmp_path, capsys):
    """One job gets the signal that SLURM sends before the time limit, and puts itself back; one is requeued by the
    operator, and killed when it runs again: that keeps the job after them from starting. The same command again makes
    what is left, `finish` follows, and the bytes are those of one process.

    What was put back waits for two minutes in SLURM, which the test cuts short, but not to nothing: a node that still
    ends a job refuses to start the same again."""
    source, out, log = tmp_path / "in.fasta", tmp_path / "out", tmp_path / "log.jsonl"
    source.write_text(fasta_of(proteins(1500, seed=4)))
    embed = ["embed", str(source), "--model", str(fair_checkpoint), "--unit-residues", "100"]
    command = [*embed, "-o", str(out), "--log-json", str(log)]

    array, finish = submitted(capsys, command)
    stop = {0: ["scancel", "--signal=USR2", f"{array}_0"], 1: ["scontrol", "requeue", f"{array}_1"]}
    while stop:
        for task in until(lambda: {unit % 2 for unit in units(log)} & stop.keys()):
            cluster.ask(*stop.pop(task))
    for task in (0, 1):
        until(lambda task=task: "BeginTime" in cluster.ask("squeue", "-h", "-r", "-j", f"{array}_{task}", "-o", "%r"))
        cluster.ask("scontrol", "update", f"JobId={array}_{task}", "StartTime=now+3")
    os.kill(until(lambda: worker(array, 1)), signal.SIGKILL)
    assert cluster.ended(array) == {f"{array}_0": "COMPLETED", f"{array}_1": "FAILED"}
    said = "".join(path.read_text() for path in (tmp_path / "out.jobs").glob(f"{array}_0_*_log.*"))
    assert "Requeued job" in said and re.search(r"committed, [1-9]\d* were there already", said)
    until(lambda: "DependencyNeverSatisfied" in cluster.ask("squeue", "-h", "-j", finish, "-o", "%r"))
    cluster.ask("scancel", finish)
    assert not (out / "run.json").exists()

    array, finish = submitted(capsys, command)
    assert cluster.ended(array) == {f"{array}_0": "COMPLETED", f"{array}_1": "COMPLETED"}
    assert cluster.ended(finish) == {finish: "COMPLETED"}
    assert main([*embed, "-o", str(tmp_path / "alone")]) == 0
    assert contents(out) == contents(tmp_path / "alone")
