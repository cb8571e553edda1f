"""Names that are safe and unique; files that are whole or absent; formats others can read."""

import errno
import os
import random
import subprocess
import sys
import urllib.parse

import h5py
import numpy as np
import pytest
import torch

from esm_fast.cli import main
from esm_fast.files.fair_esm_pt import TorchFolder
from esm_fast.files.hdf5 import HDF5Writer
from esm_fast.files.npz import NpzWriter
from esm_fast.sequences.names import LONGEST, Ids, file_name, hdf5_key

IDS = [
    "P12345",
    "sp|P12345|NAME_HUMAN Protein of unknown function OS=Homo sapiens",
    "a/b",
    "/etc/passwd",
    "../../up",
    ".",
    "..",
    ".hidden",
    "NP_000001.1",
    "1ABC:A",
    "50% sure",
    "%2F",
    "back\\slash",
    'quote"<mask>?*',
    "tab\there",
    "null\0byte",
    "line\nend",
    "naïve-蛋白質",
    "x" * 300,
    "蛋" * 300,
    "/" * 300,
    "-o",
    " ",
]


@pytest.mark.parametrize("name", IDS)
def test_file_name_stays_in_its_folder(name, tmp_path):
    path = tmp_path / f"{file_name(name)}.npz"
    path.write_bytes(b"x")
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.parent == tmp_path
    assert not path.name.startswith(".")
    assert len(os.fsencode(path.name)) < 255


@pytest.mark.parametrize("name", IDS)
def test_hdf5_key_is_one_level(name, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file[hdf5_key(name)] = np.ones(2)
        assert {key: data[:].sum() for key, data in file.items()} == {hdf5_key(name): 2}


@pytest.mark.parametrize("safe", [file_name, hdf5_key])
def test_names_can_be_read_back(safe):
    for name in IDS:
        if len(safe(name).encode()) < LONGEST - 3:  # not shortened
            assert urllib.parse.unquote(safe(name)) == name
    assert len({safe(name) for name in IDS}) == len(IDS)


def test_ordinary_ids_keep_their_names():
    for name in ("P12345", "sp|P12345|NAME_HUMAN Some protein OS=Homo sapiens", "NP_000001.1", "naïve-蛋白質"):
        assert file_name(name) == hdf5_key(name) == name
    assert hdf5_key("1ABC:A") == "1ABC:A"
    assert (file_name("a/b"), file_name(".."), file_name("a:b")) == ("a%2Fb", "%2E.", "a%3Ab")
    assert file_name("x" * 300) != file_name("x" * 301)


def test_every_record_gets_a_name_of_its_own():
    given = Ids().give(["P1", "P1", "P1_2", "P1", "Q", "P1_2", "P1"], rename=True)
    assert given == ["P1", "P1_2", "P1_2_2", "P1_3", "Q", "P1_2_3", "P1_4"]

    rng = random.Random(0)
    texts = [file_name("".join(rng.choices("a/_2", k=rng.randint(1, 5)))) for _ in range(3000)]
    assert len(set(Ids().give(texts, rename=True))) == len(texts)


def write_hdf5(path, layers, arrays, store="float32"):
    with HDF5Writer(path, layers, store=store, attributes={"model": "m"}) as writer:
        writer.add("P1", "sp|P1|ONE first", arrays)


def test_hdf5_of_one_layer_has_its_proteins_at_the_top(tmp_path):
    write_hdf5(tmp_path / "a.h5", [33], [np.arange(4, dtype=np.float32)])
    with h5py.File(tmp_path / "a.h5") as file:
        assert {key: file[key][:].tolist() for key in file} == {"P1": [0, 1, 2, 3]}
        assert file["P1"].attrs["original_id"] == "sp|P1|ONE first" and file["P1"].dtype == np.float32
        assert file.attrs["model"] == "m"


def test_hdf5_of_several_layers_has_a_group_each(tmp_path):
    write_hdf5(tmp_path / "a.h5", [0, 33], [np.zeros((2, 3)), np.ones((2, 3))], store="float16")
    with h5py.File(tmp_path / "a.h5") as file:
        assert set(file) == {"layer_0", "layer_33"}
        assert file["layer_33/P1"].shape == (2, 3) and file["layer_33/P1"].dtype == np.float16
        assert file["layer_33/P1"][:].sum() == 6 and file["layer_0/P1"].attrs["original_id"] == "sp|P1|ONE first"


def test_hdf5_takes_very_long_headers(tmp_path):
    with HDF5Writer(tmp_path / "a.h5", [1], store="float32", attributes={}) as writer:
        writer.add("P1", "é" * 200_000, [np.ones(1)])
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["P1"].attrs["original_id"] == "é" * 200_000


@pytest.mark.parametrize(
    ("value", "store", "message"),
    [
        (70000.0, "float16", "layer 2 of 'sp|P1|ONE first' holds 70000, more than float16 can store"),
        (np.nan, "float32", "holds NaN or infinity"),
        (-np.inf, "float16", "holds NaN or infinity"),
    ],
)
def test_hdf5_refuses_what_is_not_finite(tmp_path, value, store, message):
    with pytest.raises(ValueError) as caught:
        write_hdf5(tmp_path / "a.h5", [2], [np.array([1, value], dtype=np.float32)], store)
    assert message in str(caught.value)


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from esm_fast.files.atomic import atomic
from esm_fast.files.hdf5 import HDF5Writer
limit, path = int(sys.argv[1]), Path(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with atomic(path) as temporary, HDF5Writer(temporary, [1, 2], store="float32", attributes={"model": "m"}) as writer:
        for i in range(400):
            writer.add(f"p{i}", f"p{i} some", [np.ones((i % 50, 16), np.float32)] * 2)
except OSError as error:
    print(error.errno, error.filename)
"""


@pytest.mark.parametrize("limit", [0, 3000, 300_000])
def test_hdf5_on_a_full_disk_is_an_error_and_no_crash(tmp_path, limit):
    """HDF5 itself ends in a segmentation fault, at the latest when the process ends."""
    path = tmp_path / "a.h5"
    done = subprocess.run([sys.executable, "-c", FULL, str(limit), str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{errno.EFBIG} {path}\n"), done.stderr[-2000:]
    assert not list(tmp_path.iterdir()) and "Traceback" not in done.stderr


def test_what_hdf5_cannot_store_is_said_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    (tmp_path / "in.fa").write_bytes(b">a\nMKV\n>b x\0y\nMK\n")
    monkeypatch.setattr("esm_fast.inference.stream.run", lambda *_: pytest.fail("computes"))
    assert main(["embed", str(tmp_path / "in.fa"), "-o", str(tmp_path / "o.h5")]) == 1
    assert "record 2 (line 3, 'b'): its header holds a NUL character, which HDF5" in capsys.readouterr().err
    assert not (tmp_path / "o.h5").exists()


def test_torch_folder_stores_no_more_than_its_tensors(tmp_path):
    large = np.random.default_rng(0).random((1000, 64), dtype=np.float32)
    with TorchFolder(tmp_path / "new" / "out") as writer:
        writer.add("a", "the label", {"mean_representations": {2: large[3]}, "contacts": large[:2, :2]})
        assert writer.has("a") and not writer.has("b")
    (path,) = (tmp_path / "new" / "out").iterdir()
    assert path.name == "a.pt" and path.stat().st_size < 4000
    content = torch.load(path, weights_only=True)
    assert content["label"] == "the label"
    assert torch.equal(content["mean_representations"][2], torch.from_numpy(large[3]))
    assert content["contacts"].dtype == torch.float32 and content["contacts"].shape == (2, 2)


def test_torch_folder_knows_a_file_that_was_cut(tmp_path):
    with TorchFolder(tmp_path) as writer:
        writer.add("a", "a", {"mean_representations": {1: np.ones(300, np.float32)}})
        data = (tmp_path / "a.pt").read_bytes()
        for end in (0, 1, len(data) // 2, len(data) - 1):
            (tmp_path / "a.pt").write_bytes(data[:end])
            assert not writer.has("a"), end


def test_npz_reads_as_numpys(tmp_path):
    arrays = {"P1": np.random.default_rng(0).random((5, 5), dtype=np.float32), "a%2Fb": np.ones((1, 1), np.float32)}
    with NpzWriter(tmp_path / "a.npz") as writer:
        for key, array in arrays.items():
            writer.add(key, array)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert set(file) == set(arrays)
        for key, array in arrays.items():
            np.testing.assert_array_equal(file[key], array)


def test_png_of_a_map(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.image import imread

    from esm_fast.plots.contact_map import write_map

    contacts = np.eye(40, dtype=np.float32)
    write_map(tmp_path / "a.png", contacts, "a title with $one dollar" + "x" * 300)
    pixels = imread(tmp_path / "a.png")[..., :3].mean(-1)
    assert min(pixels.shape) > 500 and pixels.min() < 0.1 and pixels.max() > 0.9
