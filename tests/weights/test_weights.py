"""Checkpoints: every layout users have, told apart by content; damaged, foreign and hostile files are refused."""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from fakes import fair_esm_model, hf_model, save_fair_esm

import esm_fast
from esm_fast import weights
from esm_fast.alphabet import MASK
from esm_fast.weights import CheckpointError

TOKENS = torch.tensor([[0, 20, 15, MASK, 11, 7, 2], [0, 5, 5, 5, 2, 1, 1]])


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens)["logits"][tokens != 1]


# --- layouts --------------------------------------------------------------------------------------------------------


def test_a_fair_esm_file_loads_under_any_name(fair_model, tmp_path):
    file = save_fair_esm(fair_model, tmp_path / "esm2_renamed.backup")
    torch.testing.assert_close(logits(esm_fast.load(file)[0]), logits(fair_model), rtol=0, atol=1e-4)


def test_a_fair_esm_file_equals_fair_esms_own_loader(fair_model, tmp_path, monkeypatch):
    import esm

    file = save_fair_esm(fair_model, tmp_path / "tiny.pt")
    plain_load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: plain_load(*a, **(k | {"weights_only": False})))  # its own files
    theirs, _ = esm.pretrained.load_model_and_alphabet_local(file)
    torch.testing.assert_close(logits(esm_fast.load(file)[0]), logits(theirs.eval()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False], ids=["tied_storage", "separate_storage"])
def test_the_mask_row_is_zero_however_the_table_was_stored(fair_model, tmp_path, shared):
    file = save_fair_esm(fair_model, tmp_path / "tiny.pt")
    content = torch.load(file, weights_only=False)
    table = content["model"]["encoder.sentence_encoder.embed_tokens.weight"]
    table[MASK] = 7.0
    content["model"]["encoder.lm_head.weight"] = table if shared else table.clone()
    torch.save(content, file)
    model, _ = esm_fast.load(file)
    assert not model.embed_tokens.weight[MASK].any() and model.lm_head.weight is model.embed_tokens.weight


def test_a_legacy_torch_file_loads(fair_model, tmp_path):
    file = save_fair_esm(fair_model, tmp_path / "tiny.pt")
    torch.save(torch.load(file, weights_only=False), file, _use_new_zipfile_serialization=False)
    torch.testing.assert_close(logits(esm_fast.load(file)[0]), logits(fair_model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded", "file_in_folder"])
@pytest.mark.parametrize("norm_before", [True, False])
def test_hugging_face_folders(tmp_path, layout, norm_before):
    theirs = hf_model(emb_layer_norm_before=norm_before)
    theirs.save_pretrained(tmp_path, max_shard_size="20kB" if layout == "sharded" else "1GB")
    if layout == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    if layout == "sharded":
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    source = tmp_path / "model.safetensors" if layout == "file_in_folder" else tmp_path
    ours, _ = esm_fast.load(source)
    assert ours.config.emb_layer_norm_before == norm_before
    with torch.no_grad():
        wanted = theirs(TOKENS, attention_mask=(TOKENS != 1).long()).logits[TOKENS != 1]
    torch.testing.assert_close(logits(ours), wanted, rtol=0, atol=1e-4)


def test_an_esm_model_without_prefix_or_head(tmp_path):
    theirs = hf_model("EsmModel")
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no language-model head"):
        ours, _ = esm_fast.load(tmp_path)
    with torch.no_grad():
        wanted = theirs(TOKENS, attention_mask=(TOKENS != 1).long()).last_hidden_state
        got = ours(TOKENS, repr_layers=[2])
    torch.testing.assert_close(got["representations"][2][TOKENS != 1], wanted[TOKENS != 1], rtol=0, atol=1e-4)
    assert "logits" not in got


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_own_file_goes_round(fair_checkpoint, tmp_path, dtype):
    model, _ = esm_fast.load(fair_checkpoint, dtype=dtype)
    digest = weights.save(model, tmp_path / "own.safetensors")
    again, _ = esm_fast.load(tmp_path / "own.safetensors", dtype=dtype)
    assert again.config == model.config and len(digest) == 64
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not list(tmp_path.glob(".*"))


def test_saving_a_model_leaves_its_changed_weights_alone(fair_checkpoint, tmp_path):
    """The weights are memory-mapped, and handing back a page that was written to would undo the change."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    weights.save(esm_fast.load(fair_checkpoint)[0], first)
    model, _ = esm_fast.load(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    changed = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weights.save(model, second)
    for state in (model.state_dict(), esm_fast.load(second)[0].state_dict()):
        assert all(torch.equal(state[key], tensor) for key, tensor in changed.items())


# --- damage ---------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_our_own_file_is_found(fair_checkpoint, tmp_path):
    file = tmp_path / "own.safetensors"
    weights.save(esm_fast.load(fair_checkpoint)[0], file)
    good = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for at in torch.randint(0, len(good) * 8, (60,), generator=generator).tolist():
        bad = bytearray(good)
        bad[at // 8] ^= 1 << at % 8
        file.write_bytes(bad)
        with pytest.raises(CheckpointError):
            weights.build(weights.read(file))


@pytest.mark.parametrize("layout", ["fair", "own", "transformers"])
def test_every_truncation_is_an_error(fair_checkpoint, tmp_path, layout):
    if layout == "fair":
        shutil.copytree(fair_checkpoint.parent, tmp_path, dirs_exist_ok=True)
        file = source = tmp_path / fair_checkpoint.name
    elif layout == "own":
        file = source = tmp_path / "own.safetensors"
        weights.save(esm_fast.load(fair_checkpoint)[0], file)
    else:
        hf_model().save_pretrained(tmp_path)
        file, source = tmp_path / "model.safetensors", tmp_path
    good = file.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 1]:
        file.write_bytes(good[:size])
        with pytest.raises(CheckpointError):
            weights.build(weights.read(source))


def edited(fair_checkpoint, tmp_path, edit):
    file = tmp_path / "edited.pt"
    for source in fair_checkpoint.parent.glob("*.pt"):
        shutil.copy(source, tmp_path / source.name.replace("tiny", "edited"))
    content = torch.load(file, weights_only=False)
    edit(content["model"], vars(content["args"]))
    torch.save(content, file)
    return file


FC1 = "encoder.sentence_encoder.layers.1.fc1.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda model, args: model.pop(FC1), "missing layers.1.fc1.weight"),
        (lambda model, args: model.update(strange=torch.zeros(1)), "unexpected strange"),
        (lambda model, args: model.update({FC1: model[FC1][:5]}), r"layers.1.fc1.weight has shape \(5, 32\)"),
        (lambda model, args: model[FC1].view(-1)[7:8].fill_(float("nan")), "layers.1.fc1.weight holds NaN"),
        (lambda model, args: model[FC1].view(-1)[7:8].fill_(float("-inf")), "layers.1.fc1.weight holds NaN or inf"),
        (lambda model, args: model.update({FC1: model[FC1].int()}), "layers.1.fc1.weight is no floating-point tensor"),
        (lambda model, args: model.update({FC1: "text"}), "layers.1.fc1.weight is no floating-point tensor"),
        (lambda model, args: args.update(arch="msa_transformer"), "'msa_transformer'; esm_fast reads ESM-1b and"),
        (lambda model, args: args.update(encoder_layers="many"), "'layers' is 'many', expected a positive integer"),
        (lambda model, args: args.update(encoder_layers=2), "unexpected layers.2"),
        (lambda model, args: args.update(encoder_attention_heads=5), "not a multiple of 5"),
        (
            lambda model, args: model.update({"encoder.lm_head.weight": torch.ones(33, 32)}),
            "lm_head.weight differs from embed_tokens.weight",
        ),
    ],
)
def test_a_wrong_tensor_or_argument_is_named(fair_checkpoint, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        esm_fast.load(edited(fair_checkpoint, tmp_path, edit))


def test_other_positions_are_refused_by_name(tmp_path):
    torch.save({"cfg": {"model": argparse.Namespace(encoder_layers=2)}, "model": {}}, tmp_path / "esm1b.pt")
    with pytest.raises(CheckpointError, match="rotary frequencies"):
        esm_fast.load(tmp_path / "esm1b.pt")
    hf_model("EsmModel", position_embedding_type="relative_key").save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="position_embedding_type is 'relative_key'"):
        esm_fast.load(tmp_path / "hf")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 64}, "vocab_size is 64"),
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
    ],
)
def test_a_foreign_configuration_is_refused(tmp_path, change, message):
    hf_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        esm_fast.load(tmp_path)


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "noise.pt").write_bytes(os.urandom(4096))
    torch.save({"hello": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("noise.pt", "cannot be read"),
        ("other.pt", "no checkpoint of ESM-1b"),
        ("empty", "no config"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            esm_fast.load(tmp_path / name)


# --- hostile files --------------------------------------------------------------------------------------------------


class Payload:
    """Runs a command when unpickled by a careless loader."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class BuildPayload:
    """Hides the call in the state of an object that is itself allowed."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return argparse.Namespace, (), {"arch": Payload(self.canary)}


@pytest.mark.parametrize("payload", [Payload, BuildPayload])
@pytest.mark.parametrize("layout", ["zip", "legacy", "bare_pickle", "regression", "hf_bin"])
def test_nothing_is_executed(fair_checkpoint, tmp_path, layout, payload):
    canary = tmp_path / "canary"
    bad = {"args": payload(canary), "model": {}}
    source = file = tmp_path / "evil.pt"
    if layout == "bare_pickle":
        file.write_bytes(pickle.dumps(bad))
    elif layout == "regression":
        shutil.copy(fair_checkpoint, file)
        torch.save({"model": payload(canary)}, tmp_path / "evil-contact-regression.pt")
    elif layout == "hf_bin":
        source = tmp_path
        hf_model().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save({"esm.x": payload(canary)}, tmp_path / "pytorch_model.bin")
    else:
        torch.save(bad, file, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(CheckpointError, match="would run code|cannot be read"):
        esm_fast.load(source)
    assert not canary.exists()


def test_the_payload_is_live(tmp_path):
    """Guards the test above: a careless loader does run it."""
    file, canary = tmp_path / "evil.pt", tmp_path / "canary"
    torch.save(Payload(canary), file)
    torch.load(file, weights_only=False)
    assert canary.exists()


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    hf_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        esm_fast.load(tmp_path)


# --- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, warnings, torch, esm_fast, esm_fast.weights
warnings.simplefilter("ignore")
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model, _ = esm_fast.load(sys.argv[1], dtype=sys.argv[2])
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.parametrize(
    "layout, dtype",
    [
        ("fair", "float32"),
        ("fair", "bfloat16"),
        ("own", "float32"),
        ("own", "bfloat16"),
        ("transformers", "bfloat16"),
        ("bin", "float32"),
    ],
)
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, layout, dtype):
    model = fair_esm_model(layers=8, heads=8, head_dim=64, ffn=2048)  # 100 MB
    source = save_fair_esm(model, tmp_path / "big.pt")
    ours, _ = esm_fast.load(source)
    if layout == "own":
        source = tmp_path / "own.safetensors"
        weights.save(ours, source)
    elif layout in ("transformers", "bin"):
        source = tmp_path / "hf"
        sizes = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048)
        theirs = hf_model(**sizes)
        theirs.save_pretrained(source)
        if layout == "bin":
            (source / "model.safetensors").unlink()
            torch.save(theirs.state_dict(), source / "pytorch_model.bin")
    command = [sys.executable, "-c", PEAK, str(source), dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.3


def test_random_models_are_seeded():
    first, second, other = (esm_fast.load(f"random:esm1b_t6_demo{s}")[0] for s in ("", ":0", ":1"))
    assert torch.equal(logits(first), logits(second)) and not torch.equal(logits(first), logits(other))
    assert first.lm_head.weight is first.embed_tokens.weight


@pytest.mark.parametrize("name", ["random:esm9", "random:esm1b_t6_demo:x", "random:esm1b_t6_demo:1:2", "random:"])
def test_a_bad_random_name_is_explained(name):
    with pytest.raises(ValueError, match=r"expected random:NAME\[:seed\] with NAME one of esm1b_t33"):
        esm_fast.load(name)


@pytest.mark.parametrize("dtype", ["int4", 3, torch.int16])
def test_a_bad_dtype_is_explained(dtype):
    with pytest.raises(ValueError, match="choose one of auto, float32"):
        esm_fast.load("random:esm1b_t6_demo", dtype=dtype)
