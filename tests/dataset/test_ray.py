"""A data set by the actors of Ray Data, on a cluster of this machine: the bytes are those of one process."""

import os
import signal

import pytest

from esm_fast.cli import main
from esm_fast.cli.common import InputError

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("ray", reason="ray is not installed: pip install 'esm_fast[ray]'")
pytest.importorskip("ray.data", reason="ray lacks Ray Data: pip install 'esm_fast[ray]'")

import ray
from embedded import contents, fasta_of, proteins

from esm_fast.dataset import ray as distributed


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(fair_checkpoint, tmp_path_factory):
    """The arguments but the folder, and the folder that one process made."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "in.fasta").write_text(fasta_of(proteins(500, seed=4)))
    arguments = [str(folder / "in.fasta"), "--model", str(fair_checkpoint), "--unit-residues", "100", "--threads", "1"]
    assert main(["embed", *arguments, "-o", str(folder / "alone")]) == 0
    return arguments, folder / "alone"


def test_two_actors_make_the_bytes_of_one_process(cluster, alone, tmp_path):
    arguments, clean = alone
    assert distributed.embed([*arguments, "-o", str(tmp_path / "o")], workers=2) == 0
    assert contents(tmp_path / "o") == contents(clean)


def test_units_on_the_disk_are_kept_and_the_others_computed(cluster, alone, tmp_path):
    arguments, clean = alone
    out = tmp_path / "o"
    assert main(["embed", *arguments, "-o", str(out), "--shard", "0/2"]) == 0
    kept = {path: path.stat().st_mtime_ns for path in (out / "pooled").glob("*.parquet")}
    assert kept and not (out / "run.json").exists()
    assert distributed.embed([*arguments, "-o", str(out)], workers=2) == 0
    assert contents(out) == contents(clean)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_an_actor_that_is_killed_is_replaced(cluster, alone, tmp_path, monkeypatch):
    arguments, clean = alone
    out, killed = tmp_path / "o", tmp_path / "killed"
    monkeypatch.setattr(distributed, "_Worker", dying(distributed._Worker, killed))
    assert distributed.embed([*arguments, "-o", str(out)], workers=2) == 0
    assert killed.exists()
    assert contents(out) == contents(clean)


def dying(worker, mark):
    """A worker whose first process kills itself once it has committed a task."""

    class Dying(worker):
        def __call__(self, units):
            done = worker.__call__(self, units)
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                return done
            os.kill(os.getpid(), signal.SIGKILL)

    return Dying


@pytest.mark.parametrize(
    "inputs, message",
    [
        (["x", "-o", "o.h5"], "one file"),
        (["x", "-o", "o/", "--shard", "0/2"], "--shard"),
        (["-", "-o", "o/"], "standard input"),
    ],
)
def test_refusals(inputs, message):
    with pytest.raises(InputError, match=message):
        distributed.embed(inputs, workers=1)
