"""A data set by Ray's actors, on a cluster of this machine: the bytes are those of one process."""

import os
import signal
from types import SimpleNamespace

import pytest

from esm_fast.cli import main

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("ray", reason="ray is not installed: pip install 'esm_fast[ray]'")

import ray
from embedded import contents, fasta_of, proteins

from esm_fast.dataset import ray as distributed
from esm_fast.dataset.errors import DatasetError
from esm_fast.dataset.plan import load


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(fair_checkpoint, tmp_path_factory):
    """What is asked for but the folder, and the folder that one process made."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "in.fasta").write_text(fasta_of(proteins(200, seed=4)))
    arguments = [str(folder / "in.fasta"), "--model", str(fair_checkpoint), "--unit-residues", "100", "--threads", "1"]
    assert main(["embed", *arguments, "-o", str(folder / "alone")]) == 0
    asked = dict(inputs=folder / "in.fasta", model=fair_checkpoint, unit_residues=100, threads=1)
    return SimpleNamespace(asked=asked, arguments=arguments, clean=folder / "alone")


def test_two_actors_make_the_bytes_of_one_process(cluster, alone, tmp_path):
    seen = []
    data = distributed.build_dataset(
        folder=tmp_path / "o", workers=2, on_progress=lambda now: seen.append((now.stage, now.units)), **alone.asked
    )
    assert contents(tmp_path / "o") == contents(alone.clean) and len(data) == 200
    assert max(units for _, units in seen) == data.plan.units and seen[-1][0] == "verifying"


def test_units_on_the_disk_are_kept_and_the_others_computed(cluster, alone, tmp_path):
    out = tmp_path / "o"
    assert main(["embed", *alone.arguments, "-o", str(out), "--shard", "0/2"]) == 0
    kept = {path: path.stat().st_mtime_ns for path in (out / "pooled").glob("*.parquet")}
    assert kept and not (out / "run.json").exists()
    distributed.build_dataset(folder=out, workers=2, **alone.asked)
    assert contents(out) == contents(alone.clean)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_an_actor_that_is_killed_is_replaced(cluster, alone, tmp_path, monkeypatch):
    out, killed = tmp_path / "o", tmp_path / "killed"

    class Dying(distributed._Worker):
        """Its first process kills itself once it has committed a task."""

        def do(self, units):
            done = super().do(units)
            try:
                killed.touch(exist_ok=False)
            except FileExistsError:
                return done
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(distributed, "_Worker", Dying)
    distributed.build_dataset(folder=out, workers=2, **alone.asked)
    assert killed.exists()
    assert contents(out) == contents(alone.clean)


@pytest.mark.parametrize("how", ["raises", "kills"])
def test_a_poisoned_unit_does_not_end_the_run(cluster, alone, tmp_path, monkeypatch, how):
    out, poisoned = tmp_path / "o", 7

    class Poisoned(distributed._Worker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            compute = self.compute

            def computed(unit):
                if unit.number == poisoned:
                    if how == "kills":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise RuntimeError("poison")
                return compute(unit)

            self.compute = computed

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "_Worker", Poisoned)
        said = {"raises": "RuntimeError: poison", "kills": "3 actors died of it"}[how]
        with pytest.raises(DatasetError, match=f"^1 of .* units failed, the others are done; unit 7: {said}"):
            distributed.build_dataset(folder=out, workers=2, **alone.asked)
    plan = load(out)
    assert len(list((out / "pooled").glob("*.parquet"))) == plan.units - 1
    distributed.build_dataset(folder=out, workers=2, **alone.asked)  # the cause is mended
    assert contents(out) == contents(alone.clean)


def another_machine(mark, every):
    """Workers that find themselves on another machine: all of them, or the first one."""

    class Elsewhere(distributed._Worker):
        def __init__(self, *arguments):
            from esm_fast.dataset import fingerprint

            first = not mark.exists()
            mark.touch()
            if first or every:
                fingerprint.of_versions = lambda device, real=fingerprint.of_versions: (
                    real(device) | {"hardware": "cpu of another kind", "torch": "9.9"}
                )
            super().__init__(*arguments)

    return Elsewhere


def test_an_actor_on_another_machine_refuses_and_the_others_do_its_work(cluster, alone, tmp_path, monkeypatch):
    refused, dead = [], distributed._Run._dead
    monkeypatch.setattr(distributed, "_Worker", another_machine(tmp_path / "mark", every=False))
    monkeypatch.setattr(distributed._Run, "_dead", lambda run, *why: (refused.append(why), dead(run, *why)))
    distributed.build_dataset(folder=tmp_path / "o", workers=2, **alone.asked)
    assert ["hardware is 'cpu of another kind'" in str(error) for error, _ in refused] == [True]
    assert contents(tmp_path / "o") == contents(alone.clean)


def test_where_every_actor_refuses_the_difference_is_named(cluster, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "_Worker", another_machine(tmp_path / "mark", every=True))
    with pytest.raises(DatasetError, match="hardware is 'cpu of another kind', and was .*; torch is '9.9'"):
        distributed.build_dataset(folder=tmp_path / "o", workers=2, **alone.asked)
    assert not list((tmp_path / "o" / "pooled").iterdir())


def test_planning_holds_no_gpu(alone, tmp_path, monkeypatch):
    """What is asked of the cluster for each step: only what needs the hardware gets it."""
    asked = []

    class Fake:
        def __init__(self, **needs):
            self.needs = needs

        def __call__(self, function):
            asked.append((function.__name__, self.needs.get("num_gpus", 0)))
            return SimpleNamespace(remote=lambda *arguments: function(*arguments))

    monkeypatch.setattr(distributed.ray, "remote", Fake)
    monkeypatch.setattr(distributed.ray, "get", lambda value: value)
    monkeypatch.setattr(distributed, "_Run", lambda *_: SimpleNamespace(failed={0: "enough"}))
    with pytest.raises(DatasetError, match="enough"):
        distributed.build_dataset(folder=tmp_path / "o", workers=1, gpus=1, **alone.asked)
    assert asked == [("_settings", 1), ("planned", 0)]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="standard input"):
        distributed.build_dataset("-", tmp_path / "o", model="m", workers=1)
    with pytest.raises(TypeError, match="shard"):
        distributed.build_dataset("x", tmp_path / "o", model="m", workers=1, shard="0/2")
