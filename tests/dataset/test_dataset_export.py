"""Exports open as their users open them, and search finds what a plain computation finds."""

import hashlib

import h5py
import numpy as np
import pytest
import torch

import esm_fast
from esm_fast.cli import export, main

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from embedded import MIXED, fasta_of, proteins

from esm_fast.dataset.export import FORMATS
from esm_fast.dataset.neighbours import search
from esm_fast.inference.outputs.pooled import Mean

# Ids that no file may be named by.
ODD = fasta_of([("../up", "MKAV"), ("a/b", "MKAL"), ("x" * 300, "MKAI"), (".", "MKAT")])
FASTA = fasta_of(proteins(20, seed=7)) + MIXED + ODD
POLICIES = ["--unknown", "skip", "--empty", "skip"]


def make(source, out, model, *options):
    arguments = ["embed", source, "-o", out, "--model", model, "--unit-residues", 150, *POLICIES, *options]
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(fair_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    (folder / "in.fasta").write_text(FASTA)
    assert make(folder / "in.fasta", folder / "out", fair_checkpoint, "--residues", "--layers", 0, -1) == 0
    return folder / "out"


@pytest.fixture
def exported(folder, tmp_path):
    def run(to, name, *options):
        assert main(["export", str(folder), "--to", to, "-o", str(tmp_path / name), *options]) == 0
        return tmp_path / name

    return run


def read(path):
    with h5py.File(path) as file:
        return {key: (data[:], data.attrs["original_id"]) for key, data in file.items()}


@pytest.mark.parametrize("options", [[], ["--residues"], ["--layer", "0"]])
def test_hdf5_is_what_embed_writes_as_one_file(folder, exported, tmp_path, fair_checkpoint, options):
    out = exported("uniprot-h5", "o.h5", *options)
    how = {"--residues": ["--pool", "per-residue"], "--layer": ["--layers", "0"]}[options[0]] if options else []
    arguments = ["embed", folder.parent / "in.fasta", "-o", tmp_path / "one.h5", "--model", fair_checkpoint]
    assert main([str(argument) for argument in [*arguments, *POLICIES, *how]]) == 0
    got, wanted = read(out), read(tmp_path / "one.h5")
    assert got.keys() == wanted.keys() and len(got) == 29
    for key, (array, header) in wanted.items():
        np.testing.assert_allclose(got[key][0], array, rtol=0, atol=1e-5)
        assert got[key][1] == header


def test_bio_embeddings_has_a_key_a_sequence(folder, exported):
    data = esm_fast.open(folder)
    got = read(exported("bio-embeddings-h5", "o.h5"))
    assert len(got) == data.plan.info["sequences"]
    for number, name in enumerate(data.ids):
        array, original = got[hashlib.md5(data.sequence(number).encode()).hexdigest()]
        assert np.array_equal(array, data[number])
        assert original == {"same": "P69905", "last": "P69905"}.get(name, name)


def test_npy_is_a_matrix_and_its_ids(folder, exported):
    data, out = esm_fast.open(folder), exported("npy", "o.npy")
    assert np.array_equal(np.load(out, mmap_mode="r"), data.matrix())
    assert out.with_name("o.ids.txt").read_text().splitlines() == data.ids
    assert main(["export", str(folder), "--to", "npy", "-o", str(out.with_name("p.npy")), "--residues"]) == 1


@pytest.mark.parametrize("key", ["mean_representations", "representations"])
def test_pt_is_what_fair_esm_writes(folder, exported, key):
    data = esm_fast.open(folder)
    out = exported("pt", "files", *(["--residues"] if key == "representations" else []))
    files = {content["label"]: content for content in map(torch.load, sorted(out.iterdir()))}
    assert len(list(out.iterdir())) == len(data)
    for number, header in enumerate(data.headers):
        wanted = data.residues(number) if key == "representations" else data[number]
        if "last" not in header and "same" not in header and "P69905" not in header:
            assert np.array_equal(files[header][key][3].numpy(), wanted)
    assert not list(out.parent.glob("up*"))


def test_refusals(folder, tmp_path, capsys):
    def error(*arguments):
        assert main([str(argument) for argument in arguments]) == 1
        return capsys.readouterr().err

    assert tuple(FORMATS) == export._FORMATS
    out = tmp_path / "o.npy"
    out.write_text("precious")
    assert "give --force" in error("export", folder, "--to", "npy", "-o", out)
    assert "layer 2 is not stored; there are 0 3" in error("export", folder, "--to", "pt", "-o", "x", "--layer", 2)
    assert "is no data set" in error("export", tmp_path, "--to", "npy", "-o", tmp_path / "p.npy")
    assert "neither an id" in error("search", folder, "nobody")
    assert out.read_text() == "precious"


def test_an_unfinished_data_set_is_not_exported(folder, tmp_path, capsys, fair_checkpoint):
    make(folder.parent / "in.fasta", tmp_path / "o", fair_checkpoint, "--shard", "0/2")
    assert main(["export", str(tmp_path / "o"), "--to", "npy", "-o", str(tmp_path / "o.npy")]) == 1
    assert "is not finished" in capsys.readouterr().err


def test_proteins_without_numbers_are_left_out_and_counted(folder, tmp_path, monkeypatch, fair_checkpoint, capsys):
    def pooled_rows(*where, real=Mean.reduce):
        made = real(*where)
        made[0][:] = np.nan
        return made

    monkeypatch.setattr(Mean, "reduce", pooled_rows)
    assert make(folder.parent / "in.fasta", tmp_path / "o", fair_checkpoint) == 3
    data = esm_fast.open(tmp_path / "o")
    whole = [number for number in range(len(data)) if data.status(number) == "ok"]
    assert main(["export", str(tmp_path / "o"), "--to", "npy", "-o", str(tmp_path / "o.npy")]) == 3
    assert np.array_equal(np.load(tmp_path / "o.npy"), data.matrix()[whole])
    hits = search(data, data.matrix()[whole], 50)
    assert {-1} <= set(hits.rows.ravel()) <= {-1, *data.rows[whole]}


# ---- search


def plain(data, queries, k):
    rows = np.concatenate([block for _, block in data.blocks()]).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ rows.T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosines, order, axis=1)


@pytest.mark.parametrize("k", [1, 5, 27])
def test_search_is_exact(folder, k, monkeypatch):
    data = esm_fast.open(folder)
    queries = np.random.default_rng(1).normal(size=(9, 32)).astype(np.float32)
    monkeypatch.setattr("esm_fast.dataset.neighbours._QUERIES", 4)
    hits, (rows, cosines) = search(data, queries, k), plain(data, queries, k)
    assert np.array_equal(hits.rows, rows)
    np.testing.assert_allclose(hits.cosines, cosines, rtol=0, atol=1e-6)


def test_more_hits_than_sequences(folder):
    data = esm_fast.open(folder)
    hits = search(data, data.matrix()[:2], 40)
    assert (hits.rows[:, 27:] == -1).all() and (hits.rows[:, :27] >= 0).all()


def table(capsys):
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "query\trank\tid\tcosine"
    return [line.split("\t") for line in lines[1:]]


def test_search_by_id_file_and_data_set_agree(folder, tmp_path, capsys, fair_checkpoint):
    assert main(["search", str(folder), "same", "-k", "3"]) == 0
    by_id = table(capsys)
    assert [row[:3] for row in by_id[:3]] == [["same", "1", name] for name in ("P69905", "same", "last")]
    assert all(float(row[3]) > 0.99999 for row in by_id[:3]) and {row[1] for row in by_id} == {"1", "2", "3"}
    (tmp_path / "q.fasta").write_text(">same\nMVLSPADKTNVKAAWGKVG\n>p3\n" + dict(proteins(20, seed=7))["p3"])
    assert main(["search", str(folder), str(tmp_path / "q.fasta"), "-k", "3"]) == 0
    by_file = table(capsys)
    assert [row[:3] for row in by_file[: len(by_id)]] == [row[:3] for row in by_id]
    assert ["p3", "1", "p3"] in [row[:3] for row in by_file]
    assert make(tmp_path / "q.fasta", tmp_path / "q", fair_checkpoint) == 0
    capsys.readouterr()
    assert main(["search", str(folder), str(tmp_path / "q"), "-k", "3"]) == 0
    assert [row[:3] for row in table(capsys)] == [row[:3] for row in by_file]


def test_another_model_is_refused(folder, tmp_path, capsys, fair_model):
    from fakes import save_fair_esm

    with torch.no_grad():
        fair_model.embed_positions.weight[5, 0] += 1e-3
        other = save_fair_esm(fair_model, tmp_path / "other.pt")
        fair_model.embed_positions.weight[5, 0] -= 1e-3
    source = folder.parent / "in.fasta"
    assert main(["search", str(folder), str(source), "--model", str(other)]) == 1
    assert "is not the model" in capsys.readouterr().err
    assert make(source, tmp_path / "o", other) == 0
    assert main(["search", str(folder), str(tmp_path / "o")]) == 1
    assert "has another model" in capsys.readouterr().err
