"""Damage is found, once per file; hostile and foreign files are one line; the file that was asked for is read."""

import argparse
import collections
import hashlib
import json
import os
import random
import re
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import fair_esm_model, save_fair_esm
from safetensors.torch import save_file

import esm_fast
from esm_fast import cli, weights
from esm_fast.dataset import fingerprint
from esm_fast.weights import CheckpointError, integrity

PROTEINS = ["MKTVRQERLKSIVRILERSKEPVSGAQ", "ACDEFGHIKLMNPQRSTVWY"]
FC1 = "encoder.sentence_encoder.layers.0.fc1.weight"
SIZES = dict(layers=1, embed_dim=8, ffn_embed_dim=16, attention_heads=2)
HF = dict(model_type="esm", vocab_size=33, num_hidden_layers=1, hidden_size=8, intermediate_size=16, pad_token_id=1)
HF |= dict(num_attention_heads=2, max_position_embeddings=26, mask_token_id=32, token_dropout=True)


def embedded(path):
    model, _ = esm_fast.load(path)
    return np.stack([layers[-1] for _, layers in esm_fast.embed(model, PROTEINS)])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty memory, on the disk and in this process."""
    monkeypatch.setenv("ESM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(integrity, "_known", {})
    return tmp_path / "cache" / "checked.json"


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(integrity, "_SETTLED", -60.0)


@pytest.fixture
def passes(monkeypatch):
    """How often each file was read from its beginning to its end."""
    counted, plain = collections.Counter(), integrity._compare

    def compare(path, *rest):
        counted[Path(path).name] += 1
        return plain(path, *rest)

    monkeypatch.setattr(integrity, "_compare", compare)
    return counted


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_no_flipped_bit_of_a_torch_file_changes_a_number(fair_checkpoint, tmp_path, seed):
    shutil.copytree(fair_checkpoint.parent, tmp_path, dirs_exist_ok=True)
    file = tmp_path / fair_checkpoint.name
    good, right, refused, rng = file.read_bytes(), embedded(file), 0, random.Random(seed)
    for _ in range(60):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        try:
            assert np.array_equal(embedded(file), right)  # a byte between the records, which nobody reads
        except CheckpointError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused > 30


def test_a_flip_in_the_regression_beside_a_file_is_found(fair_checkpoint, tmp_path):
    shutil.copytree(fair_checkpoint.parent, tmp_path, dirs_exist_ok=True)
    side = tmp_path / "tiny-contact-regression.pt"
    content = torch.load(side)["model"]["contact_head.regression.weight"].numpy().tobytes()
    data = bytearray(side.read_bytes())
    data[data.index(content)] ^= 1
    side.write_bytes(data)
    with pytest.raises(CheckpointError, match="tiny-contact-regression.pt is damaged"):
        weights.read(tmp_path / "tiny.pt")


def test_a_flip_in_our_own_configuration_is_found(fair_checkpoint, tmp_path):
    """The tensors have their checksum, and would not tell that epsilon is another."""
    file = tmp_path / "own.safetensors"
    weights.save(esm_fast.load(fair_checkpoint)[0], file)
    data = file.read_bytes()
    assert data.count(b"1e-05") == 1
    file.write_bytes(data.replace(b"1e-05", b"3e-05"))
    with pytest.raises(CheckpointError, match="its configuration does not match its checksum"):
        weights.read(file)


def test_a_file_without_checksums_loads_with_a_warning(fair_checkpoint, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.load(fair_checkpoint, weights_only=False), tmp_path / "tiny.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.warns(UserWarning, match="without checksums"):
        assert np.array_equal(embedded(tmp_path / "tiny.pt"), embedded(fair_checkpoint))


def test_a_blob_is_what_its_name_says(tmp_path, cache):
    """Hugging Face's cache names files by their SHA-256."""
    blobs, place = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    place.mkdir(parents=True)
    save_file({"a": torch.arange(100.0)}, blobs / "x")
    name = integrity.sha256(blobs / "x")
    (blobs / "x").rename(blobs / name)
    (place / "model.safetensors").symlink_to(blobs / name)
    (place / "config.json").write_text(json.dumps(HF))
    with pytest.raises(CheckpointError, match="layers"):  # it is read
        weights.build(weights.read(place))
    data = bytearray((blobs / name).read_bytes())
    data[-1] ^= 1
    (blobs / name).write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is not"):
        weights.read(place)


# --- the memory -----------------------------------------------------------------------------------------------------


def test_a_file_is_read_once(fair_checkpoint, tmp_path, cache, passes, settled, monkeypatch):
    shutil.copytree(fair_checkpoint.parent, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tiny.pt"
    weights.read(file)
    weights.read(file)
    assert passes == {"tiny.pt": 1, "tiny-contact-regression.pt": 1}
    monkeypatch.setattr(integrity, "_known", {})  # as in another process
    weights.read(file)
    assert passes["tiny.pt"] == 1
    os.utime(file)
    weights.read(file)
    assert passes["tiny.pt"] == 2


def test_both_checksums_of_our_own_file_take_one_reading(fair_checkpoint, tmp_path, cache, passes, settled):
    file = tmp_path / "own.safetensors"
    own = weights.save(esm_fast.load(fair_checkpoint)[0], file)
    good = file.read_bytes()
    assert weights.sha256(file) == hashlib.sha256(good).hexdigest()
    assert integrity.tensors_checksum(file) == own == weights.read(file).sha256
    assert passes["own.safetensors"] == 1
    start = 8 + int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8:start]), good[start:]
    last = max((entry["data_offsets"][1], name) for name, entry in header.items() if name != "__metadata__")[1]
    begin, end = header[last]["data_offsets"]
    for entry in header.values():  # the last tensor lies first: another order than that of the names
        if "data_offsets" in entry:
            at, to = entry["data_offsets"]
            entry["data_offsets"] = [0, end - begin] if at == begin else [at + end - begin, to + end - begin]
    text = json.dumps(header).encode()
    turned = len(text).to_bytes(8, "little") + text + data[begin:] + data[:begin]
    for content in (good, turned):
        file.write_bytes(content)
        assert np.array_equal(embedded(file), embedded(fair_checkpoint))
        for at in (-1, -len(data) // 2, -len(data)):
            bad = bytearray(content)
            bad[at] ^= 1
            file.write_bytes(bad)
            with pytest.raises(CheckpointError, match="its tensors do not match its checksum"):
                weights.read(file)


@pytest.mark.parametrize("hide", ["mtime", "replace"])
def test_a_changed_file_is_read_again_whatever_its_mtime_says(fair_checkpoint, tmp_path, cache, settled, hide):
    file = Path(shutil.copy(fair_checkpoint, tmp_path / "tiny.pt"))
    weights.read(file)
    before, data = file.stat(), bytearray(file.read_bytes())
    data[data.index(b"PK\x01\x02") - 3000] ^= 1
    if hide == "replace":
        file.unlink()
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError):
        weights.read(file)


def test_a_file_just_written_is_not_remembered_on_disk(fair_checkpoint, tmp_path, cache):
    """It could change again within one tick of the clock."""
    weights.read(Path(shutil.copy(fair_checkpoint, tmp_path / "tiny.pt")))
    assert not cache.exists()


@pytest.mark.parametrize("harm", ["no_json", "list", "wrong_types", "deep", "link", "fifo", "folder", "open_to_others"])
def test_a_harmed_memory_is_ignored(fair_checkpoint, tmp_path, cache, passes, settled, monkeypatch, harm):
    file = Path(shutil.copy(fair_checkpoint, tmp_path / "tiny.pt"))
    digest = integrity.sha256(file)
    assert cache.exists()
    monkeypatch.setattr(integrity, "_known", {})
    stored = json.loads(cache.read_text())
    wrong = {key: value | {"sha256": "0" * 64} for key, value in stored.items()}
    if harm == "open_to_others":
        cache.write_text(json.dumps(wrong))
        cache.parent.chmod(0o777)
    elif harm in ("link", "fifo", "folder"):
        cache.unlink()
        (tmp_path / "planted").write_text(json.dumps(wrong))
        make = {"link": lambda: cache.symlink_to(tmp_path / "planted"), "fifo": lambda: os.mkfifo(cache)}
        make.get(harm, cache.mkdir)()
    else:
        wrong = {key: {"sha256": 3, "archive": "yes"} for key in stored}
        texts = {"no_json": "{", "list": "[1]", "wrong_types": json.dumps(wrong), "deep": "[" * 100_000}
        cache.write_text(texts[harm])
    assert integrity.sha256(file) == digest and passes["tiny.pt"] == 2
    if harm == "link":
        assert json.loads((tmp_path / "planted").read_text()) == wrong


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_memory_that_cannot_be_written_is_done_without(fair_checkpoint, tmp_path, cache, settled):
    cache.parent.mkdir(mode=0o500)
    assert integrity.sha256(fair_checkpoint) and not cache.exists()


def test_a_memory_where_a_file_stands_is_done_without(fair_checkpoint, tmp_path, cache, settled):
    cache.parent.write_text("")
    weights.read(fair_checkpoint)


def test_a_data_set_reads_its_model_once(tmp_path, cache, settled):
    """By the bytes that this process asked the system for, whichever part of it did."""
    pytest.importorskip("pyarrow")
    file = save_fair_esm(fair_esm_model(0, heads=8, head_dim=64, ffn=2048), tmp_path / "model.pt")
    (tmp_path / "p.fa").write_text(">a\nMKTV\n>b\nKALTARQ\n")

    def read(model, out):
        before = _bytes_read()
        assert cli.main(["embed", str(tmp_path / "p.fa"), "-o", f"{tmp_path / out}", "--model", str(model)]) in (
            0,
            None,
        )
        return _bytes_read() - before

    read("esm1b_t6_demo", "warm")  # what is imported counts no more
    size = file.stat().st_size
    assert size > 30_000_000
    first, second = read(file, "one"), read(file, "two")
    assert size < first < 1.4 * size  # the SHA-256 for the plan and the CRCs, in one reading
    assert second < 0.3 * size


def _bytes_read():
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


# --- the file that was asked for ------------------------------------------------------------------------------------


def hf_folder(folder, seed=0, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = HF | dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, layer_norm_eps=1e-5)
    sizes |= dict(emb_layer_norm_before=True, position_embedding_type="absolute")
    model = transformers.EsmForMaskedLM(transformers.EsmConfig(**{k: v for k, v in sizes.items() if k != "model_type"}))
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("name", ["ema.safetensors", "best.pt", "epoch5.bin", "pytorch_model.bin", "best.ckpt"])
def test_a_file_of_a_folder_is_that_file(tmp_path, name):
    hf_folder(tmp_path)
    other = hf_folder(tmp_path / "other", seed=1)
    write = save_file if name.endswith("safetensors") else torch.save
    write({key: tensor.clone() for key, tensor in other.state_dict().items() if "decoder" not in key}, tmp_path / name)
    got = esm_fast.load(tmp_path / name)[0].layers[0].fc1.weight
    assert torch.equal(got, other.esm.encoder.layer[0].intermediate.dense.weight)
    folder = esm_fast.load(tmp_path)[0].layers[0].fc1.weight
    assert not torch.equal(folder, got)
    assert len({fingerprint.of_model(str(path)) for path in (tmp_path, tmp_path / name, tmp_path / "other")}) == 3


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    hf_folder(tmp_path)
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="optimizer.pt"):
        esm_fast.load(tmp_path / "optimizer.pt")


@pytest.mark.parametrize("changed", ["config.json", "index", "shard", "last_shard"])
def test_every_file_of_a_sharded_folder_is_in_the_fingerprint(tmp_path, cache, changed):
    hf_folder(tmp_path, max_shard_size="20kB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    before = fingerprint.of_model(str(tmp_path))
    files = {"index": tmp_path / "model.safetensors.index.json", "shard": shards[0], "last_shard": shards[-1]}
    file = files.get(changed, tmp_path / changed)
    file.write_bytes(file.read_bytes() + b" ")
    assert fingerprint.of_model(str(tmp_path)) != before


def test_a_folders_fingerprint_is_what_it_was(tmp_path):
    """Data sets that exist are resumed."""
    from esm_fast.files.checksums import digest_of, sha256

    hf_folder(tmp_path)
    parts = ("config.json", "model.safetensors")
    assert fingerprint.of_model(str(tmp_path)) == digest_of({part: sha256(tmp_path / part) for part in parts})


# --- hostile and foreign files --------------------------------------------------------------------------------------


def edit_args(**values):
    return lambda content: vars(content["args"]).update(values)


def edit_model(edit):
    return lambda content: edit(content["model"])


TABLE = "encoder.sentence_encoder.embed_tokens.weight"
EDITS = {
    "layers_1e9": edit_args(encoder_layers=10**9),
    "layers_true": edit_args(encoder_layers=True),
    "heads_0": edit_args(encoder_attention_heads=0),
    "heads_7": edit_args(encoder_attention_heads=7),
    "dim_2e40": edit_args(encoder_embed_dim=2**40, encoder_attention_heads=1),
    "positions_2e62": edit_args(max_positions=2**62),
    "positions_1": edit_args(max_positions=1),
    "ffn_2e33": edit_args(encoder_ffn_embed_dim=2**33),
    "args_with_a_number": lambda content: vars(content["args"]).update({3: 4}),
    "model_list": lambda content: content.update(model=[1, 2]),
    "model_numbers": lambda content: content.update(model={1: torch.zeros(3)}),
    "text": edit_model(lambda model: model.update({FC1: "hello"})),
    "table_short": edit_model(lambda model: model.update({TABLE: torch.zeros(3, 32)})),
    "table_scalar": edit_model(lambda model: model.update({TABLE: torch.tensor(1.0)})),
    "table_empty": edit_model(lambda model: model.update({TABLE: torch.zeros(0, 32)})),
    "table_huge": edit_model(lambda model: model.update({TABLE: torch.ones(1).expand(2**31, 2**31)})),
    "table_list": edit_model(lambda model: model.update({TABLE: [1.0]})),
    "float8": edit_model(lambda model: model.update({FC1: model[FC1].to(torch.float8_e4m3fn)})),
    "complex": edit_model(lambda model: model.update({FC1: model[FC1].to(torch.complex64)})),
    "sparse": edit_model(lambda model: model.update({FC1: model[FC1].to_sparse()})),
    "meta": edit_model(lambda model: model.update({FC1: torch.empty(model[FC1].shape, device="meta")})),
    "huge": edit_model(lambda model: model.update({FC1: torch.ones(1).expand(2**31, 2**31)})),
    "twice": edit_model(lambda model: model.update({FC1.removeprefix("encoder."): model[FC1] + 1})),
    "escape": edit_model(lambda model: model.update({"\x1b]0;pwned\x07\x1b[31mRED": torch.zeros(1)})),
}


def refused(path):
    """The message, which is one line that names the file and holds nothing that a terminal obeys."""
    begin = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        weights.build(weights.read(path))
    message = str(caught.value)
    assert Path(path).name in message and message.isprintable() and "weights_only" not in message
    assert time.monotonic() - begin < 5
    return message


@pytest.mark.parametrize("name", EDITS)
def test_a_hostile_torch_file_is_one_line(fair_checkpoint, tmp_path, name):
    content = torch.load(fair_checkpoint, weights_only=False)
    EDITS[name](content)
    torch.save(content, tmp_path / "bad.pt")
    refused(tmp_path / "bad.pt")


@pytest.mark.parametrize("kind", ["stride_0", "negative", "shared", "transposed"])
def test_odd_but_right_tensors_give_their_numbers(fair_checkpoint, tmp_path, kind):
    content = torch.load(fair_checkpoint, weights_only=False)
    model, second = content["model"], FC1.replace("layers.0", "layers.1")
    value = torch.ones(1).expand(model[FC1].shape) if kind == "stride_0" else model[FC1]
    value = torch._neg_view(value) if kind == "negative" else value
    value = value.t().contiguous().t() if kind == "transposed" else value
    model[FC1] = value
    if kind == "shared":
        model[second] = value
    torch.save(content, tmp_path / "odd.pt")
    layers = esm_fast.load(tmp_path / "odd.pt")[0].layers
    assert torch.equal(layers[0].fc1.weight, value.clone()) and layers[0].fc1.weight.is_contiguous()
    with torch.no_grad():
        layers[0].fc1.weight.add_(1)
    assert torch.equal(layers[1].fc1.weight, model[second].clone())


@pytest.mark.parametrize(
    "change",
    [
        *({"layers": value} for value in (10**9, 0, -1, 1.5, "1", None, True, 2**70)),
        *({"embed_dim": value} for value in (-8, 0, "8", 2**40)),
        *({"layer_norm_eps": value} for value in (float("nan"), float("inf"), 0, -1.0, "small")),
        *({"attention_heads": value} for value in (0, -2, True)),
        {"max_positions": 0},
        {"token_dropout": "false"},
        {"evil": 1},
        {"family": "esm9"},
        "[1]",
        "null",
        "[" * 100_000,
    ],
    ids=lambda change: str(change)[:30],
)
def test_hostile_sizes_in_our_own_file_are_one_line(tmp_path, change):
    tensors = {"embed_tokens.weight": torch.zeros(33, 8)}
    text = change if isinstance(change, str) else json.dumps(SIZES | change)
    metadata = {"format": "esm_fast", "version": "1", "config": text, "sha256": weights.checksum(tensors)}
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    refused(tmp_path / "bad.safetensors")


HF_CONFIGS = {
    **{
        f"{name}_{value}": {name: value}
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        for value in (0, -1, "1", 1.0, None, True, [1], 10**9, 2**70)
    },
    "positions_text": {"max_position_embeddings": "26"},
    "positions_negative": {"max_position_embeddings": -5},
    "eps_text": {"layer_norm_eps": "small"},
    "eps_negative": {"layer_norm_eps": -1.0},
    "flag_text": {"token_dropout": "false"},
    "vocabulary": {"vocab_size": 33.5},
    "escape": {"position_embedding_type": "\x1b[31mX"},
    "type_list": {"model_type": ["esm"]},
}


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_hostile_sizes_of_a_folder_are_one_line(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(HF | HF_CONFIGS[name]))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    refused(tmp_path)


OTHER_JSON = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"text"',
    b"[" * 100_000,
    b"\xff\xfe",
    b"version https://git-lfs",
    b"<html>",
]
INDICES = [b"{}", b'{"weight_map": null}', b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": null}}']
INDICES += [b'{"weight_map": {"a": %s}}' % name for name in (b"3", b'"../x"', b'"/etc/passwd"', b'".."', b'"nope.bin"')]


@pytest.mark.parametrize("content", OTHER_JSON, ids=range(len(OTHER_JSON)))
def test_a_configuration_that_is_something_else_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "config.json" in refused(tmp_path)


@pytest.mark.parametrize("content", OTHER_JSON + INDICES, ids=range(len(OTHER_JSON + INDICES)))
def test_an_index_that_is_something_else_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    message = refused(tmp_path)
    assert "model.safetensors.index.json" in message


FOREIGN = {
    "Git LFS pointer.*git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "web page.*log in": b"<!DOCTYPE html><html></html>",
    "JSON.*give the folder": b'{"model_type": "esm"}',
    "gzip": b"\x1f\x8b\x08" + bytes(20),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(20),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(20),
    "FASTA": b">a\nMKT\n",
    "empty": b"",
    "damaged or incomplete": b"PK\x03\x04" + bytes(40),
    "cannot be read": b"\x80",
    "it is neither torch's nor safetensors": b"hello",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_that_is_something_else_is_called_what_it_is(tmp_path, what):
    (tmp_path / "m.pt").write_bytes(FOREIGN[what])
    assert re.search(what, refused(tmp_path / "m.pt"))


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_a_device_is_no_checkpoint(path):
    refused(path)


def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt")


def test_an_archive_that_expands_is_not_unpacked(fair_checkpoint, tmp_path):
    import zipfile

    with zipfile.ZipFile(fair_checkpoint) as good, zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as bad:
        for record in good.infolist():
            bad.writestr(record.filename, good.read(record))
    assert "compressed" in refused(tmp_path / "m.pt")


def test_headers_of_safetensors_that_lie(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for number, change in enumerate(
        [{"data_offsets": [0, 2**63]}, {"shape": [2**33, 2**33]}, {"shape": [-1]}, {"dtype": "F9"}, {"shape": "2"}]
    ):
        header = json.dumps({"a": entry | change}).encode()
        file = tmp_path / f"m{number}.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        refused(file)


@pytest.mark.parametrize("cfg", [None, 3, {}, {"model": 3}, {"model": argparse.Namespace(encoder_layers="x")}], ids=str)
def test_a_hostile_file_of_fair_esms_second_format(tmp_path, cfg):
    torch.save({"cfg": cfg, "model": {"a": torch.zeros(1)}}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt")


def test_arguments_of_another_architecture(tmp_path):
    torch.save({"args": argparse.Namespace(arch="\x1b[31mevil"), "model": {}}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt")
