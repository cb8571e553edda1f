"""Data sets: what is in the files, exact resume, refusal of anything else, shares, the whole command line."""

import gzip
import hashlib
import json
import random
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

import esm_fast
from esm_fast.cli import main

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

import torch
from embedded import MIXED, contents, fasta_of, pooled, proteins, read

from esm_fast.dataset import units
from esm_fast.dataset.plan import load
from esm_fast.dataset.planner import make_or_resume
from esm_fast.dataset.ranks import share
from esm_fast.dataset.worker import prepare_folders, work
from esm_fast.files.checked_json import read_json
from esm_fast.sequences.names import Ids
from esm_fast.sequences.seen import Seen, keys_of_texts


@pytest.fixture
def embed(fair_checkpoint, tmp_path, capsys):
    """embed(FASTA text, path or paths, options) -> exit code, what was printed, and the folder."""

    def run(fasta, *options, out="out", model=fair_checkpoint):
        paths = fasta if isinstance(fasta, list) else [fasta]
        if isinstance(fasta, str):
            paths = [tmp_path / "in.fasta"]
            paths[0].write_text(fasta)
        out = tmp_path / out
        arguments = ["embed", *paths, "-o", out, "--model", model, "--unit-residues", 100]
        code = main([str(argument) for argument in [*arguments, "--dtype", "float32", *options]])
        return SimpleNamespace(code=code, path=out, **capsys.readouterr()._asdict())

    return run


# ---- what is in it


def test_every_record_is_there_or_skipped_with_its_reason(embed):
    result = embed(MIXED, "--unknown", "skip", "--empty", "skip")
    assert result.code == 0, result.err
    assert "proteins  5 of 7 records, 3 distinct sequences" in result.out
    ids = read(result.path / "ids.parquet")
    assert [(row["record"], row["id"], row["row"]) for row in ids] == [
        (0, "P69905", 0),
        (1, "same", 0),
        (4, "A0A024", 1),
        (5, "P69905_2", 2),
        (6, "last", 0),
    ]
    assert ids[0]["header"] == "sp|P69905|HBA_HUMAN Hemoglobin"
    skipped = read(result.path / "skipped.parquet")
    assert [tuple(row.values()) for row in skipped] == [
        (2, 0, 5, "bad", "unknown residue", "'J' at 3"),
        (3, 0, 7, "none", "empty", ""),
    ]
    sequences = read(result.path / "sequences.parquet")
    assert [row["sequence"] for row in sequences] == ["MVLSPADKTNVKAAWGKVG", "MKTAYIAKQR", "MK<mask>V"]
    assert [row["length"] for row in sequences] == [19, 10, 4]
    assert all(row["digest"] == hashlib.sha256(row["sequence"].encode()).digest() for row in sequences)
    assert [ids[i]["digest"] for i in (0, 2, 3)] == [row["digest"] for row in sequences]
    run = read_json(result.path / "run.json")
    assert run["counts"]["requested"] == 7 and run["counts"]["expected"] == 5 and run["counts"]["status"] == {"ok": 3}
    assert {name: digest for name, digest in contents(result.path).items() if "/" in name} == run["files"]


@pytest.mark.parametrize("store", ["float32", "float16"])
def test_numbers_are_those_of_the_library(embed, fair_checkpoint, store):
    data = [*proteins(30, longest=60), ("long", "MKV" * 700)]
    options = ["--layers", 0, -1, "--residues", "--store", store, "--overlength", "window"]
    result = embed(fasta_of(data), *options)
    assert result.code == 0, result.err
    model, _ = esm_fast.load(fair_checkpoint, device="cpu", packed="auto")
    rows = pooled(result.path)
    assert [row["length"] for row in rows] == [len(sequence) for _, sequence in data]
    residues = [load_file(path) for path in sorted((result.path / "residues").iterdir())]
    ask = dict(layers=(0, -1), overlength="window")
    means = [arrays for _, arrays in esm_fast.embed(model, data, **ask)]
    wanted = [arrays for _, arrays in esm_fast.embed(model, data, pool="per_residue", **ask)]
    tolerance = {"float32": dict(rtol=0, atol=1e-5), "float16": dict(rtol=2e-3, atol=2e-3)}[store]
    for layer in (0, 3):
        stored = np.array([row[f"layer_{layer}"] for row in rows])
        np.testing.assert_allclose(stored, [arrays[layer] for arrays in means], **tolerance)
        of_layer = np.concatenate([part[f"layer_{layer}"] for part in residues])
        assert of_layer.dtype == store
        np.testing.assert_allclose(of_layer, np.concatenate([arrays[layer] for arrays in wanted]), **tolerance)
    for part in residues:
        assert part["offsets"][0] == 0 and part["offsets"][-1] == len(part["layer_3"])


def test_units_follow_from_the_input_alone(embed):
    result = embed(fasta_of(proteins(40)))
    plan = load(result.path)
    assert plan.units == len(list((result.path / "pooled").iterdir())) > 5
    assert sum(plan.info["unit_rows"]) == 40
    assert max(plan.info["unit_residues"]) <= 100
    one = embed(fasta_of([("long", "A" * 500), ("short", "C")]), out="long")
    assert load(one.path).info["unit_residues"] == [500, 1]


def test_compressed_input_and_several_files(embed, tmp_path):
    data = proteins(20)
    plain = embed(fasta_of(data), out="plain")
    (tmp_path / "in.gz").write_bytes(gzip.compress(fasta_of(data).encode()))
    packed = embed(tmp_path / "in.gz", out="packed")
    assert [row["id"] for row in read(packed.path / "ids.parquet")] == [label for label, _ in data]
    assert contents(plain.path)["sequences.parquet"] == contents(packed.path)["sequences.parquet"]
    two = [tmp_path / "a.fa", tmp_path / "b.fa"]
    two[0].write_text(fasta_of(data[:7]))
    two[1].write_text(fasta_of(data[7:]))
    several = embed(two, out="several")
    assert read(several.path / "ids.parquet") == read(plain.path / "ids.parquet")
    assert contents(several.path)["sequences.parquet"] == contents(plain.path)["sequences.parquet"]


def test_standard_input(forks, tmp_path, fair_checkpoint):
    source, log = tmp_path / "in.fa", tmp_path / "log"
    arguments = ["embed", "-", "-o", tmp_path / "o", "--model", fair_checkpoint]
    source.write_text(fasta_of(proteins(9)))
    for _ in range(2):  # the second run reads it again to see that it is the same
        assert forks.run(arguments, stdin=source) == 0
    source.write_text(fasta_of(proteins(10)))
    assert forks.run(arguments, stdin=source, log=log) == 1
    assert "holds another data set: input is" in log.read_text()


def test_a_data_set_is_a_folder_and_a_file_is_a_file(embed, tmp_path):
    assert embed(fasta_of(proteins(3)), out="plain.name").path.is_dir()
    main(["embed", str(tmp_path / "in.fasta"), "-o", str(tmp_path / "x.h5")])
    assert (tmp_path / "x.h5").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--force"], "remove"),
        (["--pool", "per-residue"], "give --residues"),
        (["--shard", "3/3"], "give I/N with I from 0 to N - 1"),
        (["--unknown", "error"], "record 3"),
        (["--unknown", "skip", "--empty", "skip", "--duplicates", "error"], "the id 'P69905' was there before"),
    ],
)
def test_refusals_leave_nothing(embed, options, message):
    result = embed(MIXED, *options)
    assert result.code == 1 and message in result.err and "Traceback" not in result.err
    assert not result.path.exists() or [path.name for path in result.path.iterdir()] == [".plan.lock"]


def test_a_folder_of_other_files_is_left_alone(embed, tmp_path):
    result = embed(fasta_of(proteins(3)), out=".")
    assert result.code == 1 and "is no data set and holds other files (in.fasta ...)" in result.err
    assert contents(tmp_path).keys() == {"in.fasta"}


@pytest.mark.parametrize("flag", [["--residues"], ["--shard", "0/2"], ["--unit-residues", "9"], ["--log-json", "-"]])
def test_flags_of_data_sets_are_not_for_files(tmp_path, capsys, flag):
    assert main(["embed", "x", "-o", str(tmp_path / "o.h5"), *flag]) == 1
    assert f"{flag[0]} is for data sets" in capsys.readouterr().err


def test_duplicates_may_be_skipped(embed):
    result = embed(MIXED, "--unknown", "x", "--empty", "skip", "--duplicates", "skip")
    assert result.code == 0
    skipped = read(result.path / "skipped.parquet")
    assert [(row["record"], row["reason"]) for row in skipped] == [(3, "empty"), (5, "duplicate")]


# ---- resume


def test_the_same_command_goes_on_to_the_same_bytes(embed):
    fasta = fasta_of(proteins(30))
    clean = embed(fasta, "--residues", out="clean")
    wanted = contents(clean.path)
    for name in list(wanted):
        if "/" in name:
            (clean.path / name).unlink()
            (clean.path / "run.json").unlink(missing_ok=True)
            again = embed(fasta, "--residues", out="clean")
            assert again.code == 0 and "1 committed" in again.out
            assert contents(clean.path) == wanted
    times = {path: path.stat().st_mtime_ns for path in clean.path.rglob("*") if path.is_file()}
    again = embed(fasta, "--residues", out="clean")
    assert again.code == 0 and "units     0 committed" in again.out
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_order_of_units_does_not_matter(embed):
    fasta = fasta_of(proteins(30))
    wanted = contents(embed(fasta, out="clean").path)
    for shard in ("2/3", "0/3", "1/3"):
        result = embed(fasta, "--shard", shard, out="shards")
        assert result.code == 0 and "esm-fast finish" in result.out
        assert not (result.path / "run.json").exists()
        assert main(["finish", str(result.path)]) == (0 if shard == "1/3" else 1)
    assert contents(result.path) == wanted


def test_what_was_begun_keeps_its_type(embed, fair_checkpoint, tmp_path, monkeypatch):
    """Whatever auto would choose where it is resumed, by the command and by the library."""
    fasta, native = fasta_of(proteins(30)), ["bfloat16"]
    source = tmp_path / "in.fasta"
    monkeypatch.setattr("esm_fast.inference.dtype.fastest", lambda *_: (native[0], "said so"))
    begun = embed(fasta, "--dtype", "auto", out="clean")
    assert begun.code == 0 and "dtype     bfloat16 (--dtype float32 and another folder" in begun.out
    wanted, unit = contents(begun.path), sorted(begun.path.glob("pooled/*.parquet"))[1]
    native[0] = "float32"
    for resume in (
        lambda: embed(fasta, "--dtype", "auto", out="clean").code,
        lambda: esm_fast.build_dataset(source, begun.path, model=fair_checkpoint, unit_residues=100) is None,
    ):
        unit.unlink()
        (begun.path / "run.json").unlink()
        assert not resume() and contents(begun.path) == wanted
    refused = embed(fasta, "--dtype", "float32", out="clean")
    assert refused.code == 1 and "dtype is 'float32', and was 'bfloat16'" in refused.err


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (["--store", "float16"], "store is 'float16', and was 'float32'"),
        (["--dtype", "bfloat16"], "dtype is 'bfloat16', and was 'float32'"),
        (["--pool", "cls"], "pool is 'cls', and was 'mean'"),
        (["--layers", "0", "-1"], "layers is [0, 3], and was [3]"),
        (["--residues"], "residues is True, and was False"),
        (["--overlength", "truncate"], "overlength is 'truncate', and was 'error'"),
        (["--unknown", "x"], "unknown is 'x'"),
        (["--empty", "skip"], "empty is 'skip'"),
        (["--duplicates", "skip"], "duplicates is 'skip'"),
        (["--batch-tokens", "77"], "batch_tokens is 77, and was 4096"),
        (["--unit-residues", "55"], "unit_residues is 55, and was 100"),
        (["--backend", "reference"], "backend is 'reference', and was 'auto'"),
    ],
)
def test_other_flags_are_refused_by_name(embed, made, tmp_path, change, field):
    before = contents(made.path)
    result = embed(made.fasta, *change, out=made.path)
    assert result.code == 1 and f"holds another data set: {field}" in result.err
    assert contents(made.path) == before


@pytest.fixture(scope="module")
def made(fair_checkpoint, tmp_path_factory):
    """A finished data set that tests leave as it is."""
    folder = tmp_path_factory.mktemp("made")
    fasta = folder / "in.fasta"
    fasta.write_text(fasta_of(proteins(6)))
    arguments = ["embed", fasta, "-o", folder / "out", "--model", fair_checkpoint, "--unit-residues", 100]
    assert main([str(argument) for argument in [*arguments, "--dtype", "float32"]]) == 0
    return SimpleNamespace(path=folder / "out", fasta=fasta, settings=load(folder / "out").settings)


def test_other_input_models_and_versions_are_refused_by_name(embed, made, tmp_path, fair_model, monkeypatch):
    from fakes import save_fair_esm

    other = tmp_path / "other.fasta"
    other.write_text(made.fasta.read_text().replace("some", "any"))
    assert "input is" in embed(other, out=made.path).err
    assert "input is" in embed([made.fasta, other], out=made.path).err
    with torch.no_grad():
        fair_model.embed_positions.weight[5, 0] += 1e-3
        changed = save_fair_esm(fair_model, tmp_path / "tiny.pt")
        fair_model.embed_positions.weight[5, 0] -= 1e-3
    assert "model is" in embed(made.fasta, out=made.path, model=changed).err
    monkeypatch.setattr("esm_fast.dataset.fingerprint.__version__", "9.9")
    assert "esm_fast is '9.9'" in embed(made.fasta, out=made.path).err


def test_the_same_input_and_model_elsewhere_go_on(embed, made, tmp_path, fair_checkpoint):
    moved, model = tmp_path / "moved.fa", tmp_path / "model.pt"
    moved.write_bytes(made.fasta.read_bytes())
    model.write_bytes(fair_checkpoint.read_bytes())
    result = embed(moved, out=made.path, model=model)
    assert result.code == 0 and "units     0 committed" in result.out


# ---- shares


def test_shares_are_read_from_flag_slurm_and_torchrun():
    def got(flag=None, **environ):
        return share(flag, environ)[:2]

    assert got() == (0, 1)
    assert got("2/5", RANK="1", WORLD_SIZE="2") == (2, 5)
    assert got(RANK="1", WORLD_SIZE="2", SLURM_PROCID="3", SLURM_NTASKS="4") == (1, 2)
    assert got(SLURM_PROCID="3", SLURM_NTASKS="4") == (3, 4)
    assert got(SLURM_PROCID="1", SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="2") == (1, 2)
    array = dict(SLURM_ARRAY_TASK_ID="30", SLURM_ARRAY_TASK_COUNT="4")
    assert got(**array, SLURM_ARRAY_TASK_MIN="10", SLURM_ARRAY_TASK_STEP="10") == (2, 4)
    together = dict(SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_TASK_COUNT="3", SLURM_PROCID="1", SLURM_NTASKS="2")
    assert got(**together) == (3, 6)
    shares = {
        got(SLURM_ARRAY_TASK_ID=str(a), SLURM_ARRAY_TASK_COUNT="3", RANK=str(r), WORLD_SIZE="2")[0]
        for a in range(3)
        for r in range(2)
    }
    assert shares == set(range(6))
    for wrong in (
        dict(SLURM_ARRAY_TASK_ID="7", SLURM_ARRAY_TASK_COUNT="2"),
        dict(RANK="2", WORLD_SIZE="2"),
        dict(RANK="x", WORLD_SIZE="2"),
    ):
        with pytest.raises(ValueError, match="give --shard I/N"):
            got(**wrong)
    for flag in ("1", "a/b", "2/2", "-1/2", "0/0"):
        with pytest.raises(ValueError, match="--shard is"):
            got(flag)


def test_a_share_comes_from_the_environment(embed, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = embed(fasta_of(proteins(30)))
    plan = load(result.path)
    assert "share     1 of 2 (RANK)" in result.err
    assert [units.is_done(plan, unit) for unit in range(plan.units)] == [unit % 2 == 1 for unit in range(plan.units)]


# ---- progress


def test_json_lines_a_unit(embed, tmp_path):
    log = tmp_path / "log.jsonl"
    result = embed(fasta_of(proteins(30)), "--log-json", log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    plan = load(result.path)
    assert [line["unit"] for line in lines] == list(range(plan.units))
    assert [line["residues"] for line in lines] == plan.info["unit_residues"]
    assert all(line["status"] == {"ok": line["sequences"]} for line in lines)


def test_it_must_fit_on_the_disk(embed, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    result = embed(fasta_of(proteins(5)))
    assert result.code == 1 and "will take about" in result.err and "100 B free" in result.err


def test_without_pyarrow_it_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['pyarrow'] = None; from esm_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "embed", "x", "-o", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'esm_fast[dataset]'" in done.stderr


# ---- in little memory, all at once


def test_planning_holds_a_unit_and_little_of_each_record(tmp_path, made):
    data = proteins(200, longest=1200)

    def peak(times):
        path, out = tmp_path / f"{times}.fasta", tmp_path / f"{times}"
        path.write_text(fasta_of((f"{i}{label}", text) for i in range(times) for label, text in data))
        settings = replace(made.settings, unit_residues=20000, overlength="window", input=())
        tracemalloc.start()
        plan = make_or_resume(out, [path], settings, {})
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert plan.info["requested"] == 200 * times and plan.info["sequences"] == 200
        return found, path.stat().st_size

    (small, small_size), (large, large_size) = peak(20), peak(60)
    assert large - small < 0.25 * (large_size - small_size)


@pytest.fixture
def planned(made, tmp_path, monkeypatch):
    """A plan of many units of which none is done."""
    settings = replace(made.settings, unit_residues=40, input=())
    (tmp_path / "in.fasta").write_text(fasta_of(proteins(30)))
    plan = make_or_resume(tmp_path / "o", [tmp_path / "in.fasta"], settings, {})
    prepare_folders(plan)
    return plan


def test_reading_computing_and_writing_go_on_at_once(planned, monkeypatch):
    """Each waits for what the others do to its neighbours: in turns, this would never end."""
    last = planned.units - 1
    read, begun = ([threading.Event() for _ in range(planned.units)] for _ in range(2))

    def unit(self, number, real=units.Sequences.unit):
        read[number].set()
        return real(self, number)

    def compute(unit):
        begun[unit.number].set()
        assert read[min(unit.number + 1, last)].wait(20), "the next unit is not read"
        return units.Results(unit, [])

    def write(plan, results):
        assert begun[min(results.unit.number + 1, last)].wait(20), "the next unit is not computed"
        return 0

    monkeypatch.setattr(units.Sequences, "unit", unit)
    monkeypatch.setattr("esm_fast.dataset.worker.write", write)
    done = []
    work(planned, list(range(planned.units)), compute, done.append)
    assert [committed.unit for committed in done] == list(range(planned.units)) and last > 5


def test_no_more_than_three_units_results_are_in_memory(planned, monkeypatch):
    alive, most = weakref.WeakSet(), []

    def compute(unit):
        results = units.Results(unit, [])
        alive.add(results)
        most.append(len(alive))
        return results

    def write(plan, results):
        time.sleep(0.02)
        return 0

    monkeypatch.setattr("esm_fast.dataset.worker.write", write)
    work(planned, list(range(planned.units)), compute, lambda committed: None)
    assert len(most) == planned.units and max(most) <= 3


@pytest.mark.parametrize("where", ["read", "compute", "write", "note"])
def test_an_error_in_any_thread_ends_the_run(planned, monkeypatch, where):
    def failing(*_):
        raise OSError(5, "Input/output error")

    def nothing(*_):
        return 0

    monkeypatch.setattr("esm_fast.dataset.worker.write", failing if where == "write" else nothing)
    if where == "read":
        monkeypatch.setattr(units.Sequences, "unit", failing)
    compute = failing if where == "compute" else lambda unit: units.Results(unit, [])
    with pytest.raises(OSError, match="Input/output error"):
        work(planned, list(range(planned.units)), compute, failing if where == "note" else nothing)


# ---- parts


@pytest.mark.parametrize("few", [1, 200, 1 << 18])
def test_seen_finds_what_was_added(monkeypatch, few):
    monkeypatch.setattr("esm_fast.sequences.seen._FEW", few)
    rng, seen, numbers = random.Random(3), Seen(), {}
    for _ in range(60):
        texts = list({str(rng.randrange(4000)) for _ in range(rng.randrange(90))})
        found = seen.find(keys_of_texts(texts)).tolist()
        assert found == [numbers.get(text, -1) for text in texts]
        fresh = [text for text in texts if text not in numbers]
        numbers.update({text: len(numbers) + i for i, text in enumerate(fresh)})
        seen.add(keys_of_texts(fresh), np.array([numbers[text] for text in fresh], dtype=np.int64))
    assert len(seen._runs) < 16 and sum(map(len, seen._runs + seen._parts)) == len(numbers)
    latest = sum(map(len, seen._runs))
    assert latest <= max(few, len(numbers) // 16) and (latest == len(numbers)) == (few > 4000)


def test_ids_are_given_one_by_one_as_they_are_together():
    rng = random.Random(5)
    wanted = [rng.choice("ab") + rng.choice(["", "", "_2", "_3", "_2_2"]) for _ in range(80)]
    alone, ids, given = Ids(), Ids(), []
    while len(given) < len(wanted):
        given += ids.give(wanted[len(given) : len(given) + rng.randrange(1, 9)], rename=True)
    assert given == [alone.give([text], rename=True)[0] for text in wanted]
    assert len(set(given)) == len(given)
    assert Ids().give(["a", "b", "a"], rename=False) == ["a", "b", None]


@pytest.mark.parametrize("there", [False, True], ids=["new", "an empty folder"])
def test_what_fails_before_there_is_a_plan_leaves_nothing(tmp_path, fair_checkpoint, there):
    (tmp_path / "in.fasta").write_text(">a\nMK1\n")
    if there:
        (tmp_path / "o").mkdir()
    assert main(["embed", str(tmp_path / "in.fasta"), "-o", f"{tmp_path}/o/", "--model", str(fair_checkpoint)]) == 1
    assert (tmp_path / "o").exists() == there and not list(tmp_path.glob("o/*")) and not list(tmp_path.glob("o/.*"))


def test_who_waited_for_one_that_failed_has_a_folder_of_its_own(tmp_path):
    """The folder and the lock that it waited for are gone by then."""
    from esm_fast.dataset import layout
    from esm_fast.dataset.planner import _alone_in
    from esm_fast.files.atomic import alone

    folder, entered = tmp_path / "o", []

    def second():
        with _alone_in(folder) as held:
            entered.append((held, folder.is_dir(), (folder / layout.LOCK).exists()))
            with pytest.raises(BlockingIOError), alone(folder / layout.LOCK, wait=False):
                pass
            (folder / layout.PLAN).write_text("")

    with pytest.raises(ZeroDivisionError), _alone_in(folder):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        assert not entered
        raise ZeroDivisionError
    thread.join(20)
    assert entered == [(True, True, True)] and {path.name for path in folder.iterdir()} == {layout.PLAN, layout.LOCK}
