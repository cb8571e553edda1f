"""A data set as jobs: the bytes are those of one process, also where a job was stopped; and what SLURM is asked for."""

import os
import re
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from esm_fast.cli import main

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("submitit", reason="submitit is not installed")

import submitit
from embedded import contents, fasta_of, proteins

from esm_fast.dataset import slurm
from esm_fast.dataset.build import Options

UNITS = ["--unit-residues", "100"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("submit") / "in.fasta"
    path.write_text(fasta_of(proteins(500, seed=4)))
    return path


def embed(source, out, model):
    return ["embed", str(source), "-o", str(out), "--model", str(model), *UNITS]


def preempt(logs, committed, jobs):
    """Stops the first job as a scheduler does, once it has committed a unit."""
    end = time.monotonic() + 120
    while time.monotonic() < end and not (committed.exists() and committed.stat().st_size):
        time.sleep(0.02)
    first = next(path for path in logs.glob("*_submitted.pkl"))
    os.kill(int(first.name.split("_")[0]), signal.SIGTERM)  # the job's controller, which hands it on
    jobs.append(first.name.split("_")[0])


def test_jobs_of_which_one_is_preempted_make_the_bytes_of_one_process(source, fair_checkpoint, tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    assert main(embed(source, tmp_path / "alone", fair_checkpoint)) == 0
    out, logs, log, stopped = tmp_path / "shared", tmp_path / "shared.jobs", tmp_path / "log.jsonl", []
    other = threading.Thread(target=preempt, args=(logs, log, stopped))
    other.start()
    command = [*embed(source, out, fair_checkpoint), "--log-json", str(log)]
    code = main(["submit", "--nodes", "2", "--hours", "0.2", "--local", *command])
    other.join()
    said = {path.name: path.read_text() for path in logs.glob("*_log.*")}
    assert code == 0, said
    assert contents(out) == contents(tmp_path / "alone")
    assert "the same command resumes" in said[f"{stopped[0]}_0_log.err"]
    assert f"Requeued job {stopped[0]}" in "".join(said.values())
    assert [sum(f"share     {rank} of 2" in text for text in said.values()) for rank in (0, 1)] == [1, 1]


FAKE_SBATCH = """#!/bin/sh
number=$(($(ls {folder} | wc -l) + 76))
cp "$1" {folder}/$number.sh
echo "Submitted batch job $number"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster that takes jobs and runs none: its folder fills with their scripts."""
    programs, scripts = tmp_path / "bin", tmp_path / "scripts"
    programs.mkdir()
    scripts.mkdir()
    for name, text in {"sbatch": FAKE_SBATCH.format(folder=scripts), "srun": "#!/bin/sh\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return scripts


def test_what_slurm_is_asked_for(cluster, source, tmp_path, capsys):
    size = ["--nodes", "3", "--gpus", "1", "--cpus", "4", "--mem-gb", "16", "--hours", "1.5"]
    flags = [*size, "--partition", "p", "--account", "a", "--slurm", "qos=low"]
    assert main(["submit", *flags, *embed(source, tmp_path / "o", "m")]) == 0
    assert "76_0 76_1 76_2" in capsys.readouterr().out
    array, finish = ((cluster / f"{number}.sh").read_text() for number in (76, 77))
    for line in (
        "array=0-2%3",
        "gpus-per-node=1",
        "cpus-per-task=4",
        "mem=16GB",
        "time=90",
        "partition=p",
        "account=a",
    ):
        assert f"#SBATCH --{line}\n" in array
    for script in (array, finish):
        assert re.search(r"#SBATCH --signal=USR2@\d+\n", script)
        assert "#SBATCH --requeue\n" in script and "#SBATCH --qos=low\n" in script
    assert "--dependency" not in array and "--gpus" not in finish
    assert "#SBATCH --dependency=afterok:76\n" in finish
    jobs = [submitit.core.utils.DelayedSubmission.load(path) for path in sorted((tmp_path / "o.jobs").glob("*.pkl"))]
    options = Options([source], tmp_path / "o", "m", dtype="auto", unit_residues=100)
    assert [job.args for job in jobs] == [*((options, f"{rank}/3", None) for rank in range(3)), (tmp_path / "o",)]
    assert all(job._timeout_countdown == 1000 for job in jobs)


@pytest.mark.parametrize("code", [0, 1, 3, 75])
def test_what_a_job_does_with_an_exit_code(monkeypatch, code):
    came = []
    monkeypatch.setattr(slurm.Share, "run", lambda *_: code)
    before = signal.signal(signal.SIGUSR2, lambda *_: came.append(1))
    try:
        if code in (0, 3):
            assert slurm.Share()(None, "0/2") == code
        else:
            with pytest.raises(RuntimeError, match=f"the share 0/2 ended with exit code {code}"):
                slurm.Share()(None, "0/2")
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert came == [1] * (code == 75)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--nodes", "2", "verify", "o"], "give the command to share at the end"),
        (["--nodes", "2", "embed", "x", "-o", "o.h5"], "one file, which one process writes"),
        (["--nodes", "2", "embed", "x", "-o", "o/", "--shard", "0/2"], "leave it out"),
        (["--nodes", "2", "embed", "-", "-o", "o/"], "standard input does not reach the jobs"),
        (["--nodes", "2", "--slurm", "qos", "embed", "x", "-o", "o/"], "give KEY=VALUE"),
        (["--nodes", "2", "embed", "x", "-o", "o/"], "has no sbatch"),
    ],
)
def test_refusals(monkeypatch, tmp_path, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert main(["submit", *options]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_hours_are_wrong_arguments(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["submit", "--nodes", "2", "--hours", "0", "embed", "x", "-o", "o/"])
    assert "'0' is not a number above 0" in capsys.readouterr().err


def test_a_job_that_fails_is_named_with_its_log(tmp_path, source, capsys, monkeypatch):
    failed = SimpleNamespace(job_id="77", exception=lambda: RuntimeError("exit code 1"))
    monkeypatch.setattr(slurm, "submit", lambda *_: [failed])
    assert main(["submit", "--nodes", "1", "--local", *embed(source, tmp_path / "o", "m")]) == 1
    assert f"1 of 1 jobs failed; {tmp_path}/o.jobs/77_0_log.err says why" in capsys.readouterr().err


@pytest.mark.parametrize("nodes, more, threads", [(2, [], 3), (9, [], 1), (2, ["--threads", "5"], 5)])
def test_local_jobs_have_the_cores_together(tmp_path, source, monkeypatch, nodes, more, threads):
    given = []
    monkeypatch.setattr("esm_fast.cli.submit.cores", lambda: 6)
    monkeypatch.setattr("esm_fast.cli.submit._wait", lambda *_: 0)
    monkeypatch.setattr(slurm, "submit", lambda options, *_: given.append(options.threads) or [])
    assert main(["submit", "--nodes", str(nodes), "--local", *embed(source, tmp_path / "o", "m"), *more]) == 0
    assert given == [threads]
