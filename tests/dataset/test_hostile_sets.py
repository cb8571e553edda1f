"""Data sets whose files were damaged, and hostile arguments to what reads them, in child processes: the right numbers,
or an error that a user may see; no crash, no hang, and never other numbers.

HOSTILE_SETS in the environment makes it run longer.
"""

import collections
import os
import random
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from embedded import MIXED, fasta_of, proteins
from hostile import attempts, stand_ins

import esm_fast
from esm_fast.cli import main

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from pyarrow import ArrowException

from esm_fast.dataset import export, verify
from esm_fast.dataset.errors import DatasetError

TIMES = int(os.environ.get("HOSTILE_SETS", 300))
SAID = (TypeError, ValueError, IndexError, KeyError, DatasetError)


@pytest.fixture(scope="module")
def folder(fair_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "in.fasta").write_text(fasta_of(proteins(9, seed=3)) + MIXED)
    options = ["--unit-residues", "300", "--residues", "--unknown", "skip", "--empty", "skip", "--layers", "0", "-1"]
    arguments = ["embed", folder / "in.fasta", "-o", folder / "out", "--model", fair_checkpoint, *options]
    assert main([str(argument) for argument in arguments]) == 0
    return folder / "out"


def _all(data) -> dict:
    """Every way to read, by name: a function that gives arrays and lists."""
    some = range(0, len(data), 3)
    return {
        "ids": lambda: [data.ids, data.headers],
        "lookups": lambda: [data.embedding(key, layer) for key in some for layer in data.layers],
        "residues": lambda: [data.residues(key, layer) for key in some for layer in data.layers],
        "texts": lambda: [(data.sequence(key), data.status(key)) for key in some],
        "matrix": lambda: [data.matrix(0), data.matrix()],
        "items": lambda: [(item.id, item.sequence, item.embedding) for item in data],
        "scan": lambda: [data.arrow().to_table().to_pydict()],
    }


def _same(ours, right) -> bool:
    if isinstance(right, np.ndarray):
        return ours.dtype == right.dtype and np.array_equal(ours, right, equal_nan=True)
    if isinstance(right, (list, tuple)):
        return len(ours) == len(right) and all(map(_same, ours, right))
    return ours == right


DAMAGE = {
    "a bit": lambda data, rng: _at(data, rng, lambda byte: bytes([byte ^ 1 << rng.randrange(8)])),
    "a byte more": lambda data, rng: _at(data, rng, lambda byte: bytes([byte, rng.randrange(256)])),
    "a byte less": lambda data, rng: _at(data, rng, lambda byte: b""),
    "cut": lambda data, rng: data[: rng.randrange(len(data))],
    "zeros": lambda data, rng: (
        data[: (at := rng.randrange(len(data)))] + bytes(min(512, len(data) - at)) + data[at + 512 :]
    ),
    "noise": lambda data, rng: rng.randbytes(len(data)),
    "nothing": lambda data, rng: b"",
    "twice": lambda data, rng: data + data,
    "a web page": lambda data, rng: b"<!DOCTYPE html><html>",
    "the last bytes": lambda data, rng: data[:-9] + rng.randbytes(9),
}


def _at(data: bytes, rng: random.Random, change) -> bytes:
    at = (
        rng.randrange(len(data)) if rng.random() < 0.6 else max(0, len(data) - 1 - rng.randrange(2500))
    )  # where footers are
    return data[:at] + change(data[at]) + data[at + 1 :]


def damaged(folder, right, seed: int) -> str:
    rng = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".plan.lock")
    path, how = rng.choice(files), rng.choice(sorted(DAMAGE))
    whole = path.read_bytes()
    if rng.random() < 0.1:
        path.write_bytes(rng.choice([file for file in files if file.suffix == path.suffix]).read_bytes())
    else:
        path.write_bytes(DAMAGE[how](whole, rng))
    said, name = 0, "open"
    try:
        data = esm_fast.open(folder)
        for name, read in _all(data).items():
            try:
                found = read()
            except DatasetError:
                said += 1
            except (OSError, ArrowException):  # pyarrow's own reader
                assert name == "scan"
                said += 1
            else:
                assert _same(found, right[name]), f"other {name} after {how} of {path.name}"
    except DatasetError:
        said += 1
    finally:
        try:
            if path.read_bytes() != whole:
                _, findings = verify.verify(folder)
                assert findings.problems, f"verify does not see {how} of {path.name}"
        except DatasetError:
            pass
        path.write_bytes(whole)
    return "said" if said else "right"


def test_damaged_files_give_the_right_numbers_or_an_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "o")
    right = {name: read() for name, read in _all(esm_fast.open(folder)).items()}
    seen, bad = collections.Counter(), []
    for outcome in attempts([(str(seed), partial(damaged, tmp_path / "o", right, seed)) for seed in range(TIMES)]):
        seen[outcome.returned] += 1
        if outcome.returned is None:
            bad.append(outcome)
        if outcome.crash:  # the next child begins with a whole set
            shutil.rmtree(tmp_path / "o")
            shutil.copytree(folder, tmp_path / "o")
    assert not bad, f"{len(bad)} of {TIMES}: " + "\n".join(map(str, bad[:20]))
    assert seen["said"] > TIMES / 2 and seen["right"], seen


@pytest.fixture(scope="module")
def other(folder, fair_checkpoint):
    """Of other proteins, but as many, of the same lengths."""
    text = (folder.parent / "in.fasta").read_text()
    reverse = str.maketrans("ACDEFGHIKLMNPQRSTVWYacdefghiklmnpqrstvwy", 2 * "YWVTSRQPNMLKIHGFEDCA")
    lines = [line if "<" in line else line.translate(reverse) for line in text.splitlines() if line]
    lines = [
        f">new-{old[1:]}" if old[:1] == ">" else new
        for old, new in zip(filter(None, text.splitlines()), lines, strict=True)
    ]
    (folder.parent / "other.fasta").write_text("\n".join(lines))
    options = ["--unit-residues", "300", "--residues", "--unknown", "skip", "--empty", "skip", "--layers", "0", "-1"]
    arguments = ["embed", folder.parent / "other.fasta", "-o", folder.parent / "other"]
    assert main([str(argument) for argument in [*arguments, "--model", fair_checkpoint, *options]]) == 0
    return folder.parent / "other"


def _right_or_said(data, right) -> list[str]:
    """The names of what is an error."""
    said = []
    try:
        ways = _all(data)
    except DatasetError:  # not even how many proteins there are
        return ["len"]
    for name, read in ways.items():
        try:
            found = read()
        except DatasetError:
            said.append(name)
        else:
            assert _same(found, right[name]), name
    return said


@pytest.mark.parametrize("name", ["plan.json", "ids.parquet", "sequences.parquet", "pooled", "residues"])
def test_a_part_of_another_data_set_is_never_read(folder, other, tmp_path, name):
    """As a copy over an older data set leaves it that was interrupted: each file is sound."""
    right = {what: read() for what, read in _all(esm_fast.open(folder)).items()}
    shutil.copytree(folder, tmp_path / "o")
    if (other / name).is_dir():
        shutil.rmtree(tmp_path / "o" / name)
        shutil.copytree(other / name, tmp_path / "o" / name)
    else:
        shutil.copy(other / name, tmp_path / "o" / name)
    assert _right_or_said(esm_fast.open(tmp_path / "o"), right)
    assert verify.verify(tmp_path / "o")[1].problems


def test_a_data_set_that_is_exchanged_while_it_is_open(folder, other, tmp_path, monkeypatch):
    right = {what: read() for what, read in _all(esm_fast.open(folder)).items()}
    shutil.copytree(folder, tmp_path / "o")
    data = esm_fast.open(tmp_path / "o")
    shutil.rmtree(tmp_path / "o")
    shutil.copytree(other, tmp_path / "o")
    assert _right_or_said(data, right)
    monkeypatch.chdir(folder.parent)
    data = esm_fast.open(folder.name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o").rename(folder.name)  # the same name, in the folder that is the current one now
    assert _right_or_said(data, right) == []


def test_what_desktops_and_network_file_systems_leave_is_no_problem(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "o")
    for name in (".DS_Store", "pooled/.DS_Store", "pooled/._part-000000.parquet", "residues/.nfs00000001"):
        (tmp_path / "o" / name).write_bytes(b"x")
    assert not verify.verify(tmp_path / "o")[1].problems


def asked(folder, seed: int) -> str:
    """One hostile argument to one way of reading."""
    rng, data = random.Random(seed), esm_fast.open(folder)
    key = rng.choice([0, "P69905"])
    calls = {
        "item": (lambda key: data[key], dict(key=key)),
        "embedding": (data.embedding, dict(key=key, layer=0)),
        "residues": (data.residues, dict(key=key, layer=0)),
        "sequence": (data.sequence, dict(key=key)),
        "status": (data.status, dict(key=key)),
        "number": (data.number, dict(key=key)),
        "contains": (lambda key: key in data, dict(key=key)),
        "matrix": (data.matrix, dict(layer=0)),
        "blocks": (lambda layer: list(data.blocks(layer)), dict(layer=0)),
        "open": (esm_fast.open, dict(folder=str(folder))),
        "export": (
            lambda layer: export.npy(data, folder.parent / "x.npy", export.Ask(layer, False)),
            dict(layer=0),
        ),
    }
    name = rng.choice(sorted(calls))
    function, arguments = calls[name]
    which = rng.choice(sorted(arguments))
    kind, make = rng.choice(sorted(stand_ins(arguments[which], rng).items()))
    try:
        function(**arguments | {which: make()})
    except (*SAID, OSError) as error:
        assert str(error), f"{name} {which} {kind}: {error!r}"
        return type(error).__name__
    except Exception as error:
        raise AssertionError(f"{name} {which} {kind}: {error!r}") from error
    return "returned"


def test_hostile_arguments_are_refused_by_name(folder):
    torch.set_num_threads(1)
    seen, bad = collections.Counter(), []
    for outcome in attempts([(str(seed), partial(asked, folder, seed)) for seed in range(TIMES)]):
        seen[outcome.returned] += 1
        bad += [outcome] * (outcome.returned is None)
    assert not bad, f"{len(bad)} of {TIMES}: " + "\n".join(map(str, bad[:20]))
    assert seen["returned"] and seen["KeyError"], seen
