"""load(packed=...) and files of `esm-fast convert --pack`: mapped, shared, and refused when they lie."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import esm_fast
from esm_fast import _C, weights
from esm_fast.cli import main
from esm_fast.formats.file import SUFFIX
from esm_fast.formats.weight import MATRICES, PrepackedWeight
from esm_fast.inference.load import random_model
from esm_fast.weights import CheckpointError

PROTEINS = ["MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQ", "KALTARQ"]


@pytest.fixture(autouse=True)
def any_level(monkeypatch):
    """Packing is refused where the CPU kernels would not be chosen, which on the base level they are not."""
    if _C.isa() == "base":
        pytest.skip("the CPU kernels are not chosen on this machine unless they are named")


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("plain") / "demo.safetensors"
    model = random_model("random:esm1b_t6_demo")
    torch.nn.init.normal_(model.contact_head.regression.weight)
    weights.save(model, file)
    return file


@pytest.fixture(scope="module")
def packed_file(plain_file):
    file = plain_file.with_name("packed.safetensors")
    assert main(["convert", str(plain_file), str(file), "--pack", "--dtype", "bfloat16"]) == 0
    return file


def matrices(model):
    return [layer.get_submodule(name).weight for layer in model.layers for name in MATRICES]


def is_packed(model):
    kinds = {isinstance(weight, PrepackedWeight) for weight in matrices(model)}
    assert len(kinds) == 1
    return kinds.pop()


def embedded(model):
    return [arrays[-1].tobytes() for _, arrays in esm_fast.embed(model, PROTEINS)]


# --- load ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_models_embed_the_same_bits(plain_file, tmp_path, dtype):
    file = tmp_path / "packed"
    main(["convert", str(plain_file), str(file), "--pack", "--dtype", dtype])
    ordinary, _ = esm_fast.load(plain_file, dtype=dtype)
    models = [
        esm_fast.load(plain_file, dtype=dtype, packed=True)[0],
        esm_fast.load(plain_file, dtype=dtype, packed="auto")[0],
        esm_fast.load(file)[0],
        esm_fast.load(file, dtype=dtype, packed="auto")[0],
    ]
    unpacked, _ = esm_fast.load(file, dtype=dtype, packed=False)
    assert not is_packed(ordinary) and all(is_packed(model) for model in models) and not is_packed(unpacked)
    assert all(torch.equal(a, b) for a, b in zip(matrices(unpacked), matrices(ordinary), strict=True))
    for model in (*models, unpacked):
        assert embedded(model) == embedded(ordinary)


def test_a_packed_model_uses_the_kernels_without_no_grad(packed_file, monkeypatch):
    """Were a parameter left asking for gradients, every op would unpack its weights for the reference."""
    model, _ = esm_fast.load(packed_file)
    monkeypatch.setattr(PrepackedWeight, "unpack", lambda self: pytest.fail("a prepacked weight was unpacked"))
    model(torch.tensor([[0, 20, 15, 11, 2]]), repr_layers=[3], return_contacts=True)


def test_ordinary_files_stay_ordinary_unless_asked(plain_file):
    model, _ = esm_fast.load(plain_file)
    assert not is_packed(model) and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (dict(dtype="float16"), "not float16"),
        (dict(dtype="float64"), "not float64"),
        (dict(backend="reference"), "loaded with backend='reference'"),
        (dict(device="meta"), "for the CPU kernels, not for meta"),
    ],
)
def test_packing_is_refused_where_the_kernels_would_not_run(plain_file, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        esm_fast.load(plain_file, packed=True, **arguments)
    model, _ = esm_fast.load(plain_file, packed="auto", **arguments)
    assert not is_packed(model)


def test_an_unproven_level_packs_only_by_name(plain_file, packed_file):
    before = _C.isa()
    _C.set_isa("base")
    try:
        for file in (plain_file, packed_file):
            with pytest.raises(ValueError, match="only by name on base"):
                esm_fast.load(file, packed=True)
        assert is_packed(esm_fast.load(packed_file, backend="cpu")[0])
    finally:
        _C.set_isa(before)


def test_a_packed_file_has_one_type(packed_file):
    with pytest.raises(ValueError, match=r"holds bfloat16 weights, prepacked; load it with dtype='bfloat16' or 'auto'"):
        esm_fast.load(packed_file, dtype="float32")
    model, _ = esm_fast.load(packed_file, packed=False, dtype="float32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_wrong_choice_is_explained(plain_file):
    with pytest.raises(ValueError, match="packed is 'yes'; choose one of"):
        esm_fast.load(plain_file, packed="yes")


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_packed_file_is_a_safetensors_file(packed_file, plain_file):
    """Read by the public library; the panels lie aligned, everything else as in an ordinary file."""
    ordinary, _ = esm_fast.load(plain_file, dtype="bfloat16")
    state = ordinary.state_dict()
    with safe_open(packed_file, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert file.metadata()["format"] == "esm_fast"
    assert len([key for key in tensors if key.endswith(SUFFIX)]) == len(matrices(ordinary))
    for key, tensor in tensors.items():
        if not key.endswith(SUFFIX):
            assert torch.equal(tensor, state[key])
            continue
        weight = state[key.removesuffix(SUFFIX)]
        assert tensor.dtype == torch.uint8 and tensor.data_ptr() % 64 == 0
        view = PrepackedWeight(_C.view_weights(tensor.numpy(), "bfloat16", *weight.shape))
        assert torch.equal(view.unpack(), weight)


def test_packed_files_convert_and_verify(packed_file, plain_file, tmp_path, capsys):
    assert main(["convert", str(packed_file), str(tmp_path / "again")]) == 0
    ordinary, _ = esm_fast.load(plain_file, dtype="bfloat16")
    again, _ = esm_fast.load(tmp_path / "again", dtype="bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ordinary.parameters(), strict=True))
    capsys.readouterr()
    assert main(["info", str(packed_file)]) == 0
    shown = capsys.readouterr().out
    assert "packed for the CPU kernels" in shown and "(right)" in shown
    half = tmp_path / "half"
    main(["convert", str(plain_file), str(half), "--dtype", "float16"])
    assert main(["convert", str(half), str(tmp_path / "never"), "--pack"]) == 1
    assert "give --dtype bfloat16" in capsys.readouterr().err


def test_the_command_line_packs(plain_file, packed_file, tmp_path):
    from esm_fast.cli.common import load_model

    fasta = tmp_path / "proteins.fasta"
    fasta.write_text("".join(f">{i}\n{protein}\n" for i, protein in enumerate(PROTEINS)))
    assert is_packed(load_model(str(plain_file))) and is_packed(load_model(str(packed_file)))
    for file in (plain_file, packed_file):
        command = ["embed", str(fasta), "-o", str(tmp_path / f"{file.stem}.h5"), "--model", str(file)]
        assert main([*command, "--dtype", "bfloat16"]) == 0
    import h5py

    with h5py.File(tmp_path / f"{plain_file.stem}.h5") as a, h5py.File(tmp_path / f"{packed_file.stem}.h5") as b:
        assert list(a) == list(b) and all((a[key][:] == b[key][:]).all() for key in a)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_every_truncation_of_a_packed_file_is_an_error(packed_file, tmp_path):
    good, file = packed_file.read_bytes(), tmp_path / "cut"
    for size in [0, 7, 8, 9, 100, 4096, len(good) // 2, len(good) - 1]:
        file.write_bytes(good[:size])
        with pytest.raises(CheckpointError):
            esm_fast.load(file)


def test_every_flipped_bit_of_a_packed_file_is_found(packed_file, tmp_path):
    """Outside the panels when it is loaded, in them when it is verified."""
    good, file = packed_file.read_bytes(), tmp_path / "flipped"
    start = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:start])
    panels = start + max(entry["data_offsets"][1] for key, entry in header.items() if key.endswith(SUFFIX))
    length = len(good[8:start].rstrip())  # the spaces mean nothing
    generator = torch.Generator().manual_seed(0)
    in_header = torch.randint(8, 8 + length, (30,), generator=generator).tolist()
    in_rest = torch.randint(panels, len(good), (10,), generator=generator).tolist()
    in_panels = torch.randint(start, panels, (5,), generator=generator).tolist()
    for at in [*range(8), *in_header, *in_rest, *in_panels]:
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        file.write_bytes(bad)
        with pytest.raises((CheckpointError, ValueError)):
            weights.build(weights.read(file, verify=at in in_panels))
        if at in in_panels:
            assert main(["info", str(file)]) == 1


def rewritten(packed_file, tmp_path, edit):
    """The file with another header, its data where they were."""
    good, file = packed_file.read_bytes(), tmp_path / "edited"
    start = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:start])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    file.write_bytes(len(text).to_bytes(8, "little") + text + good[start:])
    return file


def swap(header):
    keys = [f"layers.0.{name}.weight{SUFFIX}" for name in ("fc1", "self_attn.q_proj")]
    header[keys[0]], header[keys[1]] = header[keys[1]], header[keys[0]]


def change_config(**changes):
    def edit(header):
        config = json.loads(header["__metadata__"]["config"]) | changes
        header["__metadata__"]["config"] = json.dumps(config)

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda header: header["__metadata__"].update(layout="999"),
            r"layout 999, this version .* convert the original",
        ),
        (lambda header: header["__metadata__"].pop("layout"), "layout None"),
        (lambda header: header["__metadata__"].update(packed="float32"), "float32 matrix of .* takes .* these are"),
        (lambda header: header["__metadata__"].update(packed="float16"), "not float16"),
        (swap, "takes .* contiguous bytes, these are"),
        (change_config(embed_dim=3 * 2**40), "is damaged"),
        (change_config(embed_dim=-192), "is damaged"),
        (change_config(ffn_embed_dim=1), "takes .* contiguous bytes, these are"),
        (change_config(layer_norm_eps=1e-4), "does not match its checksum"),
        (lambda header: header["__metadata__"].pop("sha256_start"), "does not match its checksum"),
        (
            lambda header: header.update({"strange" + SUFFIX: header.pop("layers.0.fc1.weight" + SUFFIX)}),
            "cannot be a prepacked matrix",
        ),
        (
            lambda header: header.update({"layers.9.fc1.weight" + SUFFIX: header.pop("layers.0.fc1.weight" + SUFFIX)}),
            "missing layers.0.fc1.weight; unexpected layers.9.fc1.weight",
        ),
    ],
)
def test_a_header_that_lies_is_refused(packed_file, tmp_path, edit, message):
    with pytest.raises(CheckpointError, match=message):
        esm_fast.load(rewritten(packed_file, tmp_path, edit))


def test_a_file_rewritten_by_another_program_is_refused(packed_file, tmp_path):
    """The library sorts and packs densely, so that the panels lie anywhere."""
    with safe_open(packed_file, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        save_file(tensors, tmp_path / "again", file.metadata())
    with pytest.raises(CheckpointError, match="rewritten.*aligned to 64 bytes; convert the original again"):
        esm_fast.load(tmp_path / "again")


# --- memory ----------------------------------------------------------------------------------------------------------

HELD = """
import sys, esm_fast
model, _ = esm_fast.load(sys.argv[1])
next(iter(esm_fast.embed(model, ["MKTV"])))
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_processes_share_the_pages_of_a_packed_file(packed_file):
    command = [sys.executable, "-c", HELD, str(packed_file)]
    processes = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            mapped = mapping(process.pid, packed_file)
            assert mapped["Rss"] > 0.9 * packed_file.stat().st_size / 1024
            assert mapped["Shared_Clean"] > 0.95 * mapped["Rss"] and mapped["Private_Dirty"] == 0
    finally:
        for process in processes:
            process.communicate("\n")


def mapping(pid: int, file) -> dict[str, int]:
    """The kilobytes of each kind that a process holds of a file, from its smaps."""
    found, inside = {}, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            inside = line.endswith(str(file))
        elif inside and line.endswith(" kB"):
            name, value, _ = line.split()
            found[name[:-1]] = found.get(name[:-1], 0) + int(value)
    return found
