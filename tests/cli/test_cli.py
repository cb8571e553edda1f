"""The command line: every command on tiny inputs, every error with its exit code and message, nothing lost."""

import gzip
import importlib
import io
import json
import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from fakes import save_fair_esm

import esm_fast
from esm_fast import _C, cli
from esm_fast.cli import common, main

FASTA = """\
>sp|P69905|HBA_HUMAN Hemoglobin subunit alpha
MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQ
>tr|A0A024|A0A024_HUMAN
MKTAYIAKQRQISFVK
SHFSRQ*
>plain second word
mk
"""
COMMAND = [sys.executable, "-c", "import sys; from esm_fast.cli import main; sys.exit(main())"]


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text(FASTA)
    return path


@pytest.fixture
def embed(fair_checkpoint, tmp_path, capsys):
    """embed(FASTA text or path, options) -> exit code, what was printed, and the path of the output."""

    def run(fasta, *options, model=fair_checkpoint):
        path = fasta
        if isinstance(fasta, str):
            path = tmp_path / "text.fasta"
            path.write_text(fasta)
        out = tmp_path / "out.h5"
        arguments = ["embed", path, "-o", out, "--model", model, "--dtype", "float32", *options]
        code = main(list(map(str, arguments)))
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err, path=out)

    return run


def read(path):
    with h5py.File(path) as file:
        return {key: file[key][:] for key in file}


def error_line(result):
    """The message: one line, after warnings and bars, no traceback."""
    assert "Traceback" not in result.err
    return result.err.strip().splitlines()[-1]


# ---- embed


def test_embed_writes_what_the_library_computes(embed, fasta, fair_checkpoint):
    result = embed(fasta)
    assert result.code == 0
    model, _ = esm_fast.load(fair_checkpoint, device="cpu")
    wanted = [arrays[-1] for _, arrays in esm_fast.embed(model, fasta)]
    got = read(result.path)
    assert list(got) == ["A0A024", "P69905", "plain"]
    for key, array in zip(["P69905", "A0A024", "plain"], wanted, strict=True):
        np.testing.assert_allclose(got[key], array, rtol=0, atol=1e-6)
    with h5py.File(result.path) as file:
        assert file["P69905"].attrs["original_id"] == "sp|P69905|HBA_HUMAN Hemoglobin subunit alpha"
        assert file["plain"].attrs["original_id"] == "plain second word"
        assert file.attrs["model"] == str(fair_checkpoint) and "warning" not in file.attrs


@pytest.mark.parametrize("pool", ["mean", "cls", "max", "std", "per-residue"])
def test_embed_layers_and_pools(embed, fasta, fair_checkpoint, pool):
    result = embed(fasta, "--layers", 0, -1, 3, "--pool", pool, "--store", "float16", "--batch-tokens", 20)
    assert result.code == 0
    model, _ = esm_fast.load(fair_checkpoint, device="cpu")
    keys = ["P69905", "A0A024", "plain"]
    with h5py.File(result.path) as file:
        assert set(file) == {"layer_0", "layer_3"}
        for key, (_, arrays) in zip(
            keys, esm_fast.embed(model, fasta, layers=(0, 3), pool=pool.replace("-", "_")), strict=True
        ):
            for layer in (0, 3):
                stored = file[f"layer_{layer}/{key}"]
                assert stored.dtype == np.float16 and stored.shape == arrays[layer].shape
                np.testing.assert_allclose(stored[:], arrays[layer], rtol=2e-3, atol=2e-3)


def test_auto_dtype_is_bfloat16_where_the_cpu_has_it(embed, fasta):
    native = _C.isa() in ("avx512bf16", "amx")
    result = embed(fasta, "--dtype", "auto", "--device", "cpu")
    assert result.code == 0
    dtype = "bfloat16" if native else "float32"
    assert f"dtype     {dtype} (the kernels' level {_C.isa()} " in result.err
    named = read(embed(fasta, "--dtype", dtype, "--device", "cpu", "--force").path)
    auto = read(embed(fasta, "--dtype", "auto", "--device", "cpu", "--force").path)
    assert all((auto[key] == named[key]).all() for key in named)
    with h5py.File(result.path) as file:
        assert file.attrs["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_dtype_is_that_of_a_packed_file(embed, fasta, fair_checkpoint, tmp_path, dtype):
    packed = tmp_path / "packed.safetensors"
    assert main(["convert", str(fair_checkpoint), str(packed), "--dtype", dtype, "--pack"]) == 0
    result = embed(fasta, "--dtype", "auto", "--device", "cpu", model=packed)
    assert result.code == 0 and f"dtype     {dtype} (that of the prepacked file)" in result.err


@pytest.mark.parametrize(
    "isa, gpu, device, backend, dtype",
    [
        ("amx", None, "auto", None, "bfloat16"),
        ("avx512bf16", (9, 0), "cpu", None, "bfloat16"),
        ("avx512bf16", None, "cpu", "cpu", "bfloat16"),
        ("amx", None, "cpu", "reference", "float32"),
        ("avx512", None, "cpu", None, "float32"),
        ("base", None, "auto", None, "float32"),
        ("base", (9, 0), "auto", None, "bfloat16"),
        ("amx", (8, 0), "cuda:1", None, "bfloat16"),
        ("amx", (7, 0), "auto", None, "float16"),
        ("amx", (7, 5), "cuda", "cuda", "float16"),
        ("amx", (6, 1), "auto", None, "float32"),
    ],
)
def test_auto_dtype_by_machine(monkeypatch, capsys, isa, gpu, device, backend, dtype):
    monkeypatch.setattr(_C, "isa", lambda: isa)
    monkeypatch.setattr(_C, "at_least", lambda level: level == "avx512bf16" and isa in ("avx512bf16", "amx"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu)
    monkeypatch.setattr(common, "require_device", lambda device: None)  # the GPU is made up
    monkeypatch.setattr("esm_fast.inference.dtype.as_measured", lambda dtype, why, device: (dtype, why))  # nor measured
    args = SimpleNamespace(dtype="auto", device=device, model=common.DEMO, backend=backend)
    assert common.dtype_of(args) == dtype
    assert f"dtype     {dtype} (" in capsys.readouterr().err
    assert common.dtype_of(SimpleNamespace(dtype="float16", device=device)) == "float16"


def test_embed_summary_counts_everything(embed):
    text = FASTA + ">j1\nMJJK*\n>none\n>x/1\nMK\n>x/1\nMKV\n>long\n" + "MK" * 600 + "\n"
    result = embed(text, "--unknown", "x", "--empty", "skip", "--overlength", "truncate")
    assert result.code == 0
    for part in (
        "proteins  7 of 8 records",
        f"residues  {55 + 22 + 2 + 4 + 2 + 3 + 1022:,} in",
        "0 unknown residue, 1 empty, 0 duplicate",
        "record 5, 'none': empty",
        "2 unknown residues read as X, 2 final * stripped, 1 truncated, 0 windowed, 1 duplicates renamed",
        "layers    3 (mean, stored as float32)",
        str(result.path),
    ):
        assert part in result.out, part
    assert set(read(result.path)) == {"A0A024", "P69905", "plain", "j1", "x%2F1", "x%2F1_2", "long"}
    reading = result.out[result.out.index("  import h5py") :]
    scope = {}
    exec("\n".join(line[2:] for line in reading.splitlines()), scope)
    assert set(scope["embeddings"]) == set(read(result.path))


def test_embed_reading_lines_work_for_several_layers(embed, fasta):
    result = embed(fasta, "--layers", 1, 2)
    scope = {}
    exec("\n".join(line[2:] for line in result.out[result.out.index("  import h5py") :].splitlines()), scope)
    assert set(scope["embeddings"]) == {"A0A024", "P69905", "plain"}


def test_embed_skips_are_listed_and_sum_up(embed):
    records = [f">bad{i}\nMJ\n" for i in range(12)] + [">same\nMK\n"] * 3 + [">\n"]
    result = embed("".join(records), "--unknown", "skip", "--duplicates", "skip", "--empty", "skip")
    assert result.code == 0
    assert "proteins  1 of 16 records" in result.out
    assert "12 unknown residue, 1 empty, 2 duplicate, 0 already done" in result.out
    assert "record 10, 'bad9': unknown residue" in result.out and "bad10" not in result.out
    assert "and 5 more" in result.out
    assert set(read(result.path)) == {"same"}


def test_embed_windows(embed, fair_checkpoint):
    sequence = "MKTAYIAKQRQISFVKSHFSRQ" * 50
    result = embed(f">long\n{sequence}\n", "--overlength", "window", "--pool", "per-residue")
    assert result.code == 0 and "1 windowed" in result.out
    model, _ = esm_fast.load(fair_checkpoint, device="cpu")
    ((_, arrays),) = esm_fast.embed(model, [sequence], overlength="window", pool="per_residue")
    np.testing.assert_allclose(read(result.path)["long"], arrays[-1], rtol=0, atol=1e-5)


def test_embed_reads_several_and_compressed_files(fair_checkpoint, fasta, tmp_path, capsys):
    packed = tmp_path / "more.whatever"
    packed.write_bytes(gzip.compress(b">plain again\nMKV\n>b\nM\n"))
    out = tmp_path / "out.h5"
    assert main(["embed", str(fasta), str(packed), "-o", str(out), "--model", str(fair_checkpoint)]) == 0
    assert "proteins  5 of 5 records" in capsys.readouterr().out
    assert set(read(out)) == {"A0A024", "P69905", "plain", "plain_2", "b"}


def test_embed_reads_standard_input(fair_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(gzip.compress(FASTA.encode()))))
    assert main(["embed", "-", "-o", str(tmp_path / "o.h5"), "--model", str(fair_checkpoint)]) == 0
    assert len(read(tmp_path / "o.h5")) == 3
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b">a\nMJ\n")))
    assert main(["embed", "-", "-o", str(tmp_path / "p.h5"), "--model", str(fair_checkpoint)]) == 1
    assert "<stdin>: record 1 (line 1, 'a'), column 2" in capsys.readouterr().err


def test_embed_reads_a_pipe(fair_checkpoint, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = subprocess.Popen(["cp", "/dev/stdin", str(pipe)], stdin=subprocess.PIPE)
    writer.stdin.write(FASTA.encode())
    writer.stdin.close()
    assert main(["embed", str(pipe), "-o", str(tmp_path / "o.h5"), "--model", str(fair_checkpoint)]) == 0
    assert writer.wait() == 0 and len(read(tmp_path / "o.h5")) == 3


def test_random_weights_say_so_everywhere(embed, fasta):
    result = embed(fasta, "--threads", max(1, torch.get_num_threads()), model="random:esm1b_t6_demo")
    assert result.code == 0
    assert "ITS NUMBERS MEAN NOTHING" in result.err and "THESE NUMBERS MEAN NOTHING" in result.out
    with h5py.File(result.path) as file:
        assert "mean nothing" in file.attrs["warning"]


def test_embed_shows_a_bar_in_residues(embed, fasta):
    assert "79.0/79.0" in embed(fasta).err


BAD_INPUT = [
    (">a\nMK\n>b x\nMKJ\n", [], "record 2 (line 3, 'b'), column 3: 'J' (0x4a) is not a residue", "--unknown x"),
    (">a\nM1K\n", [], "column 2: '1'", "--unknown skip"),
    (">a\n>b\nM\n", [], "record 1 (line 1, 'a'): it has no residues", "--empty skip"),
    (f">a\n{'M' * 1023}\n", [], "it has 1023 residues and the limit is 1022", "--overlength window"),
    (">sp|P1|A\nM\n>P1\nM\n", ["--duplicates", "error"], "record 2 (line 3): the id 'P1' was there before", "skip"),
    ("MKV\n>a\nM\n", [], "line 1", "before the first '>'"),
    ("", [], "no FASTA record", "empty"),
    (">a\nJ\n", ["--unknown", "skip"], "all 1 records were skipped", ""),
    (">a\nM\n", ["--layers", "7"], "layer 7 does not exist", "0 (the embedding) to 3"),
    (">a\nM\n", ["--backend", "quantum"], "no backend 'quantum'", "reference"),
    (">a\nM\n", ["--device", "abacus"], "device 'abacus' cannot be used", ""),
]


@pytest.mark.parametrize(("text", "options", "message", "advice"), BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(embed, text, options, message, advice):
    result = embed(text, *options)
    assert result.code == 1 and result.out == ""
    assert message in error_line(result) and advice in error_line(result)
    assert [path.name for path in result.path.parent.iterdir()] == ["text.fasta"]


def test_a_truncated_gz_is_an_error(embed, tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(FASTA.encode())[:-20])
    result = embed(tmp_path / "a.gz")
    assert result.code == 1 and "a.gz: the gz stream is cut short" in error_line(result)


def test_missing_files_are_named(embed, fasta, tmp_path):
    result = embed(tmp_path / "nowhere.fa")
    assert result.code == 1 and error_line(result).endswith("nowhere.fa: No such file or directory")
    result = embed(tmp_path)
    assert result.code == 1 and "Is a directory" in error_line(result)
    result = embed(fasta, model="nowhere.pt")
    assert result.code == 1 and "nowhere.pt is neither a file nor a model" in error_line(result)
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    result = embed(fasta, model=tmp_path / "broken.pt")
    assert result.code == 1 and "broken.pt cannot be read" in error_line(result)


def test_output_is_not_overwritten_without_force(embed, fasta, tmp_path):
    (tmp_path / "out.h5").write_text("precious")
    result = embed(fasta)
    assert result.code == 1 and "out.h5 exists; give --force" in error_line(result)
    assert (tmp_path / "out.h5").read_text() == "precious"
    assert embed(fasta, "--force").code == 0 and len(read(tmp_path / "out.h5")) == 3


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("no/such/o.h5", "does not exist; make it first"),
        ("no/such/o", "does not exist; make it first"),
        ("in.fasta", "is a file; give a folder"),
    ],
)
def test_impossible_outputs(fasta, tmp_path, capsys, out, message):
    assert main(["embed", str(fasta), "-o", str(tmp_path / out)]) == 1
    assert message in capsys.readouterr().err


def test_output_must_fit_on_the_disk(embed, fasta, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    result = embed(fasta)
    assert result.code == 1 and "will take about 2.03 kB" in error_line(result) and "1 kB free" in error_line(result)


def test_the_estimate_is_near_the_size(embed, monkeypatch):
    asked = []
    monkeypatch.setattr("esm_fast.cli.embed.check_space", lambda folder, needed: asked.append(needed))
    result = embed("".join(f">p{i}\n{'MKV' * 30}\n" for i in range(60)), "--pool", "per-residue")
    assert result.code == 0 and 0.9 < result.path.stat().st_size / asked[0] < 1.2


def test_a_failure_half_way_leaves_nothing(embed, fasta, monkeypatch, tmp_path):
    from esm_fast.files.hdf5 import HDF5Writer

    def add(self, key, header, arrays, real=HDF5Writer.add):
        if key == "plain":
            raise OSError(28, "No space left on device", "out.h5")
        real(self, key, header, arrays)

    monkeypatch.setattr(HDF5Writer, "add", add)
    result = embed(fasta)
    assert result.code == 1 and "out.h5: No space left on device" in error_line(result)
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


def test_numbers_too_large_for_float16_are_refused(embed, fasta, monkeypatch):
    from esm_fast.inference.outputs.pooled import Mean

    monkeypatch.setattr(Mean, "reduce", lambda *where, real=Mean.reduce: [mean + 1e6 for mean in real(*where)])
    result = embed(fasta, "--store", "float16")
    assert result.code == 1 and "more than float16 can store; store float32" in error_line(result)
    assert not result.path.exists()


def test_a_full_gpu_is_one_line(embed, fasta, monkeypatch):
    from esm_fast.inference import stream

    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(stream, "_forward", forward)
    result = embed(fasta)
    assert result.code == 1 and "ask for smaller batches" in error_line(result) and not result.path.exists()


def test_a_backend_that_cannot_run_says_why(embed, fasta):
    if torch.cuda.is_available():
        pytest.skip("xformers may run here")
    result = embed(fasta, "--backend", "xformers")
    assert result.code == 1 and "cannot run on backend 'xformers'" in error_line(result)
    assert "needs a CUDA device" in error_line(result)
    assert embed(fasta, "--backend", "reference").code == 0


def test_input_that_changes_while_it_is_read_is_noticed(embed, fasta, monkeypatch):
    from esm_fast.sequences.ingest import Source

    def scan(self, real=Source.scan):
        counts = real(self)
        fasta.write_text(FASTA + ">more\nM\n")
        return counts

    monkeypatch.setattr(Source, "scan", scan)
    result = embed(fasta)
    assert result.code == 1 and "input changed while it was read" in error_line(result) and not result.path.exists()


# ---- fill-mask


def test_fill_mask_prints_the_most_probable(fair_model, fair_checkpoint, capsys):
    import esm

    sequence = "QERLKSIVRILE<mask>SLGYNIVAT"
    assert main(["fill-mask", sequence, "--model", str(fair_checkpoint), "--json", "--top", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    _, _, tokens = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()([("", sequence)])
    with torch.no_grad():
        best = fair_model(tokens)["logits"][0, 13].softmax(-1).topk(4)
    assert [p["token"] for p in found] == best.indices.tolist()
    np.testing.assert_allclose([p["score"] for p in found], best.values.numpy(), atol=1e-4)
    token = found[0]["token_str"]
    assert token == esm_fast.Alphabet().get_tok(found[0]["token"])
    assert found[0]["sequence"] == f"Q E R L K S I V R I L E {token} S L G Y N I V A T"
    assert main(["fill-mask", sequence, "--model", str(fair_checkpoint), "--top", "1"]) == 0
    assert capsys.readouterr().out == f"residue 13\n  {best.values[0]:.4f}  {best.indices[0]:2}  {token}\n"


def test_fill_mask_takes_several_masks(fair_checkpoint, capsys):
    assert main(["fill-mask", "MK<mask>A<mask>", "--model", str(fair_checkpoint), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert len(first) == len(second) == 5
    assert first[0]["sequence"] == f"M K {first[0]['token_str']} A <mask>"
    assert second[0]["sequence"] == f"M K <mask> A {second[0]['token_str']}"


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("MKV", "has no <mask>"),
        ("", "no residues"),
        ("MKJ<mask>", "column 3: 'J'"),
        ("M" * 1022 + "<mask>", "has 1023 residues; this model takes 1022"),
    ],
)
def test_fill_mask_errors(fair_checkpoint, capsys, sequence, message):
    assert main(["fill-mask", sequence, "--model", str(fair_checkpoint)]) == 1
    assert message in capsys.readouterr().err


# ---- contacts


def fair_contacts(fair_model, sequence):
    import esm

    _, _, tokens = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()([("", sequence)])
    with torch.no_grad():
        return fair_model.predict_contacts(tokens)[0].numpy()


def test_contacts_in_one_file(fair_model, fair_checkpoint, tmp_path, capsys):
    (tmp_path / "in.fa").write_text(">sp|P1|A\nMKTAYIAKQR\n>a/b\nMKV\n>a/b\nM\n")
    out = tmp_path / "maps.npz"
    assert main(["contacts", str(tmp_path / "in.fa"), "-o", str(out), "--model", str(fair_checkpoint)]) == 0
    text = capsys.readouterr().out
    assert "proteins  3 of 3 records" in text and str(out) in text
    with np.load(out) as maps:
        assert set(maps) == {"P1", "a%2Fb", "a%2Fb_2"}
        for key, sequence in (("P1", "MKTAYIAKQR"), ("a%2Fb", "MKV"), ("a%2Fb_2", "M")):
            assert maps[key].dtype == np.float32
            np.testing.assert_allclose(maps[key], fair_contacts(fair_model, sequence), rtol=0, atol=1e-5)


def test_contacts_in_a_folder_with_pictures(fair_checkpoint, fasta, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out = tmp_path / "maps"
    arguments = ["contacts", str(fasta), "-o", str(out), "--png", "--model", str(fair_checkpoint)]
    assert main(arguments) == 0
    keys = ("P69905", "A0A024", "plain")
    assert {path.name for path in out.iterdir()} == {f"{key}.{end}" for key in keys for end in ("npz", "png")}
    assert np.load(out / "P69905.npz")["P69905"].shape == (55, 55)
    assert (out / "P69905.png").read_bytes()[:4] == b"\x89PNG" and (out / "P69905.png").stat().st_size > 5000
    assert main(arguments) == 1
    assert "holds .npz files; give --force" in capsys.readouterr().err


def test_contacts_errors(fair_model, fair_checkpoint, fasta, tmp_path, capsys, monkeypatch):
    bare = save_fair_esm(fair_model, tmp_path / "bare.pt", regression=False)
    assert main(["contacts", str(fasta), "-o", str(tmp_path / "o.npz"), "--model", str(bare)]) == 1
    assert "contact regression" in capsys.readouterr().err and not (tmp_path / "o.npz").exists()
    (tmp_path / "file").write_text("x")
    assert main(["contacts", str(fasta), "-o", str(tmp_path / "file"), "--model", str(bare)]) == 1
    assert "is a file; give a folder" in capsys.readouterr().err
    monkeypatch.setattr("esm_fast.cli.contacts.find_spec", lambda name: None)
    assert main(["contacts", str(fasta), "-o", str(tmp_path / "o.npz"), "--png", "--model", str(fair_checkpoint)]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


# ---- convert and info


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_convert_keeps_the_model(fair_checkpoint, tmp_path, capsys, dtype):
    out = tmp_path / "tiny.safetensors"
    assert main(["convert", str(fair_checkpoint), str(out), *(["--dtype", dtype] if dtype else [])]) == 0
    text = capsys.readouterr().out
    digest = text.split("sha256")[1].split()[0]
    assert len(digest) == 64 and "read back and equal" in text
    model, _ = esm_fast.load(fair_checkpoint, device="cpu", dtype=dtype or "float32")
    copy, _ = esm_fast.load(out, device="cpu", dtype=dtype or "float32")
    for key, tensor in model.state_dict().items():
        assert torch.equal(copy.state_dict()[key], tensor), key
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]

    assert main(["info", str(out)]) == 0
    text = capsys.readouterr().out
    assert digest in text and "(right)" in text and "attention_heads        4" in text and "esm_fast" in text
    assert main(["convert", str(fair_checkpoint), str(out)]) == 1
    assert "--force" in capsys.readouterr().err

    data = bytearray(out.read_bytes())
    data[-1] ^= 1
    out.write_bytes(data)
    assert main(["info", str(out)]) == 1
    assert "do not match its checksum" in capsys.readouterr().err


def test_convert_refuses_random_weights(tmp_path, capsys):
    assert main(["convert", "random:esm1b_t6_demo", str(tmp_path / "o.safetensors")]) == 1
    assert "numbers mean nothing" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_convert_refuses_a_dtype_that_overflows(fair_checkpoint, tmp_path, capsys):
    content = torch.load(fair_checkpoint, weights_only=False)
    content["model"]["encoder.sentence_encoder.layers.0.fc1.bias"][0] = 1e30
    torch.save(content, tmp_path / "large.pt")
    out = tmp_path / "o.safetensors"
    assert main(["convert", str(tmp_path / "large.pt"), str(out), "--dtype", "float16"]) == 1
    assert "layers.0.fc1.bias holds numbers too large" in capsys.readouterr().err and not out.exists()


def test_info_names_machine_ops_and_caches(capsys, monkeypatch, tmp_path):
    from esm_fast.ops import OPS

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"esm_fast  {esm_fast.__version__}" in text and f"torch {torch.__version__}" in text
    assert f"{torch.get_num_threads()} for torch" in text and str(tmp_path / "hub" / "checkpoints") in text
    for op in OPS:
        rows = [line for line in text.splitlines() if line.split()[:1] == [op]]
        assert rows and all("*" in row for row in rows)
    assert "reference" in text and "esm1v_t33_650M_UR90S_5" in text


def test_info_of_a_fair_esm_file(fair_checkpoint, capsys):
    assert main(["info", str(fair_checkpoint)]) == 0
    text = capsys.readouterr().out
    assert "kind        fair-esm" in text and "contacts    fitted" in text and "none in this format" in text


# ---- the frame


@pytest.mark.parametrize("command", [command.name for command in cli.commands()])
def test_every_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and f"examples:\n  esm-fast {command}" in text


def test_a_command_is_a_file_that_is_found(monkeypatch, capsys):
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    found = cli.commands()
    assert {command.file for command in found} <= files and len(found) >= 23
    assert len({command.order for command in found}) == len(found)
    for command in found:  # what is read in the file is what it holds
        module = command.module()
        assert (command.name, command.order, command.help) == (module.NAME, module.ORDER, module.HELP)
        assert command.file == command.name.replace("-", "_")
    assert {file for file in files if hasattr(importlib.import_module(f"esm_fast.cli.{file}"), "NAME")} == {
        command.file for command in found
    }
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    places = [re.search(rf"\n +{command.name}\s", text).start() for command in found]
    assert places == sorted(places)


def test_commands_are_found_where_only_bytecode_is(tmp_path, monkeypatch):
    source = tmp_path / "fly.py"
    source.write_text('NAME = "fly"\nORDER = 7\nHELP = "not yet"\n')
    py_compile.compile(str(source), str(tmp_path / "fly.pyc"))
    source.unlink()
    monkeypatch.setattr(cli, "__path__", [str(tmp_path)])
    assert cli.commands() == [cli.Command("fly", 7, "not yet", "fly")]
    sys.modules.pop("esm_fast.cli.fly")


def imported(line: str) -> set[str]:
    code = f"import sys; from esm_fast.cli import commands, parser; {line}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())


def test_a_command_imports_no_other_and_help_none():
    files = {f"esm_fast.cli.{command.file}" for command in cli.commands()}
    assert imported("parser().parse_args(['verify', 'folder'])") & files == {"esm_fast.cli.verify"}
    assert not imported("parser().format_help()") & files


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["embed"], ["embed", "a", "-o", "b", "--pool", "median"], ["info", "a", "b"]]
)
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: esm-fast" in capsys.readouterr().err


def test_version_and_help_do_not_import_torch():
    assert not {"torch", "numpy"} & imported("[command.module() for command in commands()]")
    assert "torch" not in imported("import esm_fast.dataset.reader")
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"esm-fast {esm_fast.__version__}\n")


def test_a_closed_pipe_is_quiet():
    process = subprocess.Popen([*COMMAND, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 128 + signal.SIGPIPE and error == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_file(fair_checkpoint, tmp_path, number):
    (tmp_path / "in.fa").write_text("".join(f">p{i}\n{'MKV' * 300}\n" for i in range(2000)))
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["embed", tmp_path / "in.fa", "-o", out / "o.h5", "--model", fair_checkpoint]
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not list(out.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    assert list(out.iterdir()), "it did not begin to write"
    process.send_signal(number)
    error = process.stderr.read().decode()
    assert process.wait() == 128 + number and "Traceback" not in error
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_within_a_destructor_is_not_lost(number):
    """What a handler raises there Python prints and drops: the run went on as if nobody had asked it to stop."""
    code = f"""
import signal, time
from esm_fast.cli import info, main

class Freed:
    def __del__(self):
        signal.raise_signal({int(number)})

def run(args):
    Freed()
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
info.run = run
raise SystemExit(main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    said = "interrupted\n" if number == signal.SIGINT else ""
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", said)


def test_human_bytes():
    values = {0: "0 B", 999: "999 B", 1500: "1.5 kB", 2.5e9: "2.5 GB", 9e14: "900 TB"}
    assert {value: common.human_bytes(value) for value in values} == values
