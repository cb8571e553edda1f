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
OPTIONS = [
    "--dtype",
    "float32",
    "--unit-residues",
    "150",
    "--residues",
    "--unknown",
    "skip",
    "--empty",
    "skip",
    "--layers",
    "0",
    "-1",
]


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


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def without_checksums(path):
    """A unit's table as it was before there was a checksum for each protein."""
    from esm_fast.dataset import layout

    table = layout.pq.read_table(path)
    fields = [(field.name, field.type) for field in table.schema]
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    del metadata["residues_checksums"]
    with layout.table(path, fields, metadata, compression="none") as written:
        written.add(table.columns)


@pytest.mark.parametrize("old", [False, True])
def test_residues_are_as_they_were_written_or_refused(folder, tmp_path, old):
    """Wherever a bit is flipped; where there is a checksum a protein, only those that it touches are refused."""
    import shutil

    out = tmp_path / "o"
    shutil.copytree(folder, out)
    if old:
        without_checksums(out / "pooled/part-000000.parquet")
    right = esm_fast.open(folder)
    here = [number for number in range(len(right)) if right._place(right.rows[number])[0] == 0]
    asked = [(number, layer) for number in here for layer in right.layers]
    wanted = {ask: right.residues(*ask) for ask in asked}
    first, second = sorted((out / "residues").iterdir())[:2]
    whole, refused = first.read_bytes(), []

    def given() -> int:
        """How many are given; the others are refused."""
        data, count = esm_fast.open(out), 0
        for ask in asked:
            try:
                rows = data.residues(*ask)
            except DatasetError as error:
                assert "part-000000.safetensors is damaged" in str(error)
            else:
                count += 1
                assert rows.dtype == wanted[ask].dtype and np.array_equal(rows, wanted[ask])
        return count

    assert given() == len(asked) > 6
    start = 8 + int.from_bytes(whole[:8], "little")
    numbers = start + 8 * (right._pooled(0).ends.size)  # safetensors sorts: int64 before float32
    for at in [*range(8, len(whole), len(whole) // 40), *range(8, start, 7)]:
        first.write_bytes(flipped(whole, at))
        refused.append(len(asked) - given())
        assert refused[-1] == len(asked) if old else refused[-1] == 1 or at < numbers
    first.write_bytes(second.read_bytes())
    assert given() == 0
    first.write_bytes(whole)
    data = esm_fast.open(out)
    assert np.array_equal(data.residues(0), wanted[0, right.layers[-1]])
    first.write_bytes(flipped(whole, numbers + 1 + whole[numbers:].index(wanted[0, right.layers[-1]].tobytes())))
    with pytest.raises(DatasetError, match="is damaged"):  # while it is open
        data.residues(0)


def test_the_checksum_is_one_for_all_times():
    """Data sets hold it: its definition, in Python."""
    from esm_fast import _C

    odd, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def checksum(data: bytes) -> int:
        chains = [(i + 1) * odd & mask for i in range(8)]
        padded = data + bytes(-len(data) % 64)
        for i, word in enumerate(np.frombuffer(padded, "<u8").tolist()):
            chain = (chains[i % 8] ^ word) * odd & mask
            chains[i % 8] = chain ^ chain >> 32
        whole = len(data) % 64
        for chain in chains:
            whole = (whole ^ chain) * odd & mask
            whole ^= whole >> 29
        return whole

    data = np.random.default_rng(0).bytes(1000)
    bounds = np.array([0, 0, 1, 64, 129, 500, 1000])
    wanted = [checksum(data[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert _C.piece_checksums(data, bounds).tolist() == wanted
    for wrong in ([], [0, 1001], [-1, 5], [5, 0], [[0, 1]]):
        with pytest.raises(ValueError, match="bounds must rise"):
            _C.piece_checksums(data, np.array(wrong, dtype=np.int64))
    with pytest.raises(TypeError, match="contiguous bytes"):
        _C.piece_checksums(np.zeros((2, 2), np.uint8), bounds)


def test_a_scan_compares_pages_with_their_checksums(folder, tmp_path):
    import shutil

    from pyarrow import ArrowException

    out = tmp_path / "o"
    shutil.copytree(folder, out)
    path, embedding = out / "pooled/part-000000.parquet", esm_fast.open(folder)[0].tobytes()
    path.write_bytes(flipped(path.read_bytes(), path.read_bytes().index(embedding) + 5))
    with pytest.raises((OSError, ArrowException), match="(?i)crc|checksum"):
        esm_fast.open(out).arrow().to_table()
    with pytest.raises(DatasetError, match="part-000000.parquet is damaged"):
        esm_fast.open(out)[0]


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


def test_rows_of_residues_are_read_where_the_header_says_they_are_and_nowhere_else(tmp_path):
    import json

    from safetensors.numpy import save

    from esm_fast.dataset import units

    path, rows = tmp_path / "x.safetensors", np.arange(24, dtype=np.float16).reshape(6, 4)
    whole = save({"layer_1": rows[::-1].copy(), "layer_2": rows})
    path.write_bytes(whole)
    for bounds in ((0, 6), (2, 5), (3, 3)):
        assert np.array_equal(units.read_residues(path, 2, bounds, (6, 4), "float16"), rows[slice(*bounds)])
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    entry, lies = header["layer_2"], []
    for change in ({"shape": [6, 2**60]}, {"dtype": "F32"}, {"data_offsets": [-8, 40]}, {"data_offsets": [0, 8]}):
        text = json.dumps(header | {"layer_2": entry | change}).encode()
        lies.append(len(text).to_bytes(8, "little") + text + whole[-96:])
    for broken in (*lies, whole[:-1], whole[:20], b"", b"\xff" * 99, whole.replace(b"layer_2", b"layer_3")):
        path.write_bytes(broken)
        with pytest.raises((ValueError, LookupError, TypeError)):
            units.read_residues(path, 2, (0, 6), (6, 4), "float16")
