"""esm_fast.open: by number and by id, lazily, as numpy, torch and Arrow, and what it says of what is not there."""

import numpy as np
import pytest
import torch

import esm_fast
from esm_fast.cli import main

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from embedded import MIXED, fasta_of, proteins

from esm_fast.dataset.errors import DatasetError
from esm_fast.inference.outputs.pooled import Mean

FASTA = fasta_of(proteins(20, seed=7)) + MIXED
OPTIONS = ["--unit-residues", "150", "--residues", "--unknown", "skip", "--empty", "skip", "--layers", "0", "-1"]


@pytest.fixture(scope="module")
def folder(fair_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    (folder / "in.fasta").write_text(FASTA)
    arguments = ["embed", folder / "in.fasta", "-o", folder / "out", "--model", fair_checkpoint, *OPTIONS]
    assert main([str(argument) for argument in arguments]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def wanted(folder, fair_checkpoint):
    model, _ = esm_fast.load(fair_checkpoint, device="cpu", packed="auto")
    ask = dict(layers=(0, -1), unknown="skip", empty="skip")
    means = esm_fast.embed(model, folder.parent / "in.fasta", **ask)
    residues = esm_fast.embed(model, folder.parent / "in.fasta", pool="per_residue", **ask)
    return [(mean, rows) for (_, mean), (_, rows) in zip(means, residues, strict=True)]


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_every_protein_by_number_and_by_id(folder, wanted):
    data = esm_fast.open(folder)
    assert len(data) == len(wanted) == len(data.ids) == 25
    assert data.ids[20:] == ["P69905", "same", "A0A024", "P69905_2", "last"]
    assert data.headers[20] == "sp|P69905|HBA_HUMAN Hemoglobin"
    order = np.random.default_rng(0).permutation(len(data)).tolist()
    for number in order:
        name = data.ids[number]
        mean, rows = wanted[number]
        assert name in data and data.number(name) == number
        close(data[number], mean[-1])
        assert np.array_equal(data[name], data[number]) and np.array_equal(data[number - len(data)], data[number])
        close(data.embedding(name, layer=0), mean[0])
        close(data.residues(name), rows[-1])
        close(data.residues(number, layer=0), rows[0])
        assert data.status(name) == "ok"
    assert data.sequence("P69905_2") == "MK<mask>V" and data.sequence("same") == data.sequence("last")
    assert np.array_equal(data["same"], data["P69905"])


def test_all_at_once(folder, wanted):
    data = esm_fast.open(folder)
    matrix = data.matrix()
    close(matrix, [mean[-1] for mean, _ in wanted])
    close(data.matrix(layer=0), [mean[0] for mean, _ in wanted])
    assert torch.equal(data.torch(), torch.from_numpy(matrix))
    for number, item in enumerate(data):
        assert item.id == data.ids[number] and item.sequence == data.sequence(number)
        assert np.array_equal(item.embedding, matrix[number])
    table = data.arrow().to_table(columns=["length", "layer_3"])
    assert table.num_rows == data.plan.info["sequences"] == 23
    blocks = list(data.blocks())
    assert [row for row, _ in blocks] == np.cumsum([0, *map(len, (rows for _, rows in blocks))])[:-1].tolist()


def test_nothing_is_read_before_it_is_asked_for(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "o")
    (tmp_path / "o/pooled/part-000001.parquet").write_bytes(b"")
    data = esm_fast.open(tmp_path / "o")
    assert data[0].shape == (32,)
    first = int(data._ends[1])
    with pytest.raises(DatasetError, match="part-000001.parquet is damaged"):
        data[first]


def test_residues_that_are_not_as_they_were_written_are_never_given(folder, tmp_path):
    import shutil

    out = tmp_path / "o"
    shutil.copytree(folder, out)
    first, second = sorted((out / "residues").iterdir())[:2]
    whole = first.read_bytes()
    for at in range(8, len(whole), len(whole) // 40):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        first.write_bytes(data)
        with pytest.raises(DatasetError, match="part-000000.safetensors is damaged"):
            esm_fast.open(out).residues(0)
    first.write_bytes(second.read_bytes())
    with pytest.raises(DatasetError, match="part-000000.safetensors is damaged"):
        esm_fast.open(out).residues(0)
    first.write_bytes(whole)
    data = esm_fast.open(out)
    assert np.array_equal(data.residues(0), esm_fast.open(folder).residues(0))
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # while it is open
    with pytest.raises(DatasetError, match="is damaged"):
        data.residues(0)


def test_what_is_not_there(folder, tmp_path, fair_checkpoint, monkeypatch):
    data = esm_fast.open(folder)
    assert "nobody" not in data
    for key, error in (("nobody", KeyError), (25, IndexError), (-26, IndexError)):
        with pytest.raises(error):
            data[key]
    with pytest.raises(KeyError, match="layer 2 is not stored"):
        data.matrix(layer=2)
    with pytest.raises(DatasetError, match="is no data set"):
        esm_fast.open(tmp_path)

    def pooled_rows(*where, real=Mean.reduce):
        made = real(*where)
        made[0][:] = np.nan
        return made

    monkeypatch.setattr(Mean, "reduce", pooled_rows)
    source, out = folder.parent / "in.fasta", tmp_path / "o"
    options = ["--unknown", "skip", "--empty", "skip", "--unit-residues", "150"]
    assert main(["embed", str(source), "-o", str(out), "--model", str(fair_checkpoint), *options]) == 3
    data = esm_fast.open(out)
    with pytest.raises(DatasetError, match="made without --residues"):
        data.residues(0)
    without = [number for number in range(len(data)) if data.status(number) == "not finite"]
    assert without and np.isnan(data.matrix()[without]).all()
    assert [number for number, item in enumerate(data) if item.embedding is None] == without
    with pytest.raises(DatasetError, match="has no embedding: not finite"):
        data[without[0]]


def test_a_star_import_keeps_the_open_of_python():
    names = {}
    exec("from esm_fast import load, embed\nimport esm_fast\nnames = set(esm_fast.__all__)", names)
    assert "open" not in names["names"] and "open" in dir(esm_fast)
