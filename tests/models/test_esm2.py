"""ESM-2 against fair-esm's and transformers' own, on random models in the head shapes of all six published sizes."""

import dataclasses
import warnings
from argparse import Namespace

import numpy as np
import pytest
import torch

import esm_fast
from esm_fast import hub, ops, weights
from esm_fast.models import family
from esm_fast.models.esm2 import CONFIGS, Config
from esm_fast.sequences.batching import pack
from esm_fast.weights import CheckpointError

KEY = "layers.0.self_attn.rot_emb.inv_freq"
# (width, heads): the head dimensions of 8M, 35M, 150M, 650M and 3B, 15B.
SHAPES = {16: (64, 4), 24: (48, 2), 32: (64, 2), 64: (128, 2), 128: (256, 2)}
RESIDUES = "LAGVSERTIDPKQNFYMHWC"


def protein(length: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(list(RESIDUES), length))


PROTEINS = [("masks", f"{protein(30, 1)}<mask>{protein(9, 2)}<mask>"), ("one", "M"), ("long", protein(600, 3))]


def fair_esm(width: int, heads: int, layers: int = 2):
    theirs = pytest.importorskip("esm.model.esm2", reason="fair-esm is not installed")
    torch.manual_seed(width)
    model = theirs.ESM2(num_layers=layers, embed_dim=width, attention_heads=heads).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.3)
        for name, parameter in model.named_parameters():
            if "layer_norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def save_fair_esm(model, path, *, regression=True):
    """As fair-esm publishes ESM-2; `lm_head.weight` is there, and the regression in a file beside."""
    state, side = {}, {}
    for key, tensor in model.state_dict().items():
        if key.startswith("contact_head"):
            side[key] = tensor
        else:
            state[("encoder." if key.startswith("lm_head") else "encoder.sentence_encoder.") + key] = tensor
    sizes = dict(encoder_layers=model.num_layers, encoder_embed_dim=model.embed_dim, token_dropout=True)
    sizes |= dict(encoder_attention_heads=model.attention_heads)
    torch.save({"cfg": {"model": Namespace(**sizes)}, "args": None, "model": state}, path)
    if regression:
        torch.save({"model": side}, path.with_name(path.stem + family.REGRESSION))
    return path


def hugging_face(kind: str, width: int, heads: int, **fields):
    transformers = pytest.importorskip("transformers")
    fields = FIELDS | dict(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width) | fields
    torch.manual_seed(width)
    model = getattr(transformers, kind)(transformers.EsmConfig(**fields, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.3)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1)
    return model


FIELDS = dict(vocab_size=33, pad_token_id=1, mask_token_id=32, num_hidden_layers=2, token_dropout=True)
FIELDS |= dict(position_embedding_type="rotary", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
FIELDS |= dict(layer_norm_eps=1e-5, emb_layer_norm_before=False, max_position_embeddings=1026)


def tokens_of(proteins):
    _, _, tokens = esm_fast.Alphabet.from_architecture("ESM-1b").get_batch_converter()(proteins)
    return tokens


def close(got, wanted, share: float = 1e-4):
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= share * float(wanted.abs().max())


# ---- against fair-esm


@pytest.mark.parametrize("head_dim", SHAPES)
def test_all_results_are_fair_esms(head_dim, tmp_path):
    theirs = fair_esm(*SHAPES[head_dim])
    ours, _ = esm_fast.load(save_fair_esm(theirs, tmp_path / "a.pt"))
    tokens = tokens_of(PROTEINS)
    real = tokens != 1
    options = dict(repr_layers=[0, 1, 2], need_head_weights=True, return_contacts=True)
    with torch.no_grad():
        wanted, got = theirs(tokens, **options), ours(tokens, **options)
        alone = ours(tokens, repr_layers=[1, 2])  # without maps the whole stack runs at once
    for layer in (0, 1, 2):
        close(got["representations"][layer][real], wanted["representations"][layer][real])
    for layer in (1, 2):
        close(alone["representations"][layer][real], wanted["representations"][layer][real])
    close(got["logits"][real], wanted["logits"][real])
    close(got["attentions"], wanted["attentions"])
    assert float((got["contacts"] - wanted["contacts"]).abs().max()) < 1e-5


@pytest.mark.parametrize("length", [1, 2000])
def test_one_residue_and_two_thousand(length, tmp_path):
    theirs = fair_esm(64, 4)
    ours, _ = esm_fast.load(save_fair_esm(theirs, tmp_path / "a.pt"))
    tokens = tokens_of([("a", protein(length))])
    with torch.no_grad():
        close(ours(tokens)["logits"], theirs(tokens)["logits"])
        last = theirs(tokens, repr_layers=[2])["representations"][2][0, 1:-1]
        ((_, found),) = esm_fast.embed(ours, [("a", protein(length))], pool="per_residue")
    close(torch.from_numpy(found[-1]), last)


def test_padding_on_the_left_and_in_the_middle_is_as_there(tmp_path):
    theirs = fair_esm(64, 4)
    ours, _ = esm_fast.load(save_fair_esm(theirs, tmp_path / "a.pt"))
    tokens = tokens_of([("a", protein(20)), ("b", protein(7))]).roll(5, 1)
    tokens[0, 12:14] = 1
    real = tokens != 1
    with torch.no_grad():
        close(ours(tokens)["logits"][real], theirs(tokens)["logits"][real])


@pytest.mark.parametrize("head_dim", SHAPES)
def test_gradients_are_fair_esms(head_dim, tmp_path):
    theirs = fair_esm(*SHAPES[head_dim])
    ours, _ = esm_fast.load(save_fair_esm(theirs, tmp_path / "a.pt"))
    tokens = tokens_of(PROTEINS[:2] + [("c", protein(70))])
    real = tokens != 1
    seed = torch.randn(int(real.sum()), 33, generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        model.requires_grad_(True)
        (model(tokens)["logits"][real] * seed).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    largest = max(float(g.abs().max()) for g in gradients.values() if g is not None)
    for name, parameter in ours.named_parameters():
        if gradients[name] is not None:
            assert float((parameter.grad - gradients[name]).abs().max()) <= 1e-4 * largest, name


def test_frequencies_are_those_of_the_file(tmp_path):
    theirs = fair_esm(64, 4)
    before = esm_fast.load(save_fair_esm(theirs, tmp_path / "before.pt"))[0]
    for layer in theirs.layers:
        layer.self_attn.rot_emb.inv_freq.mul_(1.01)
    ours = esm_fast.load(save_fair_esm(theirs, tmp_path / "a.pt"))[0]
    tokens = tokens_of(PROTEINS)
    with torch.no_grad():
        wanted, got, other = (model(tokens[2:])["logits"] for model in (theirs, ours, before))
    close(got, wanted)
    assert float((other - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())


def test_layers_that_turn_differently_are_refused(tmp_path):
    theirs = fair_esm(64, 4)
    theirs.layers[1].self_attn.rot_emb.inv_freq.mul_(1.01)
    with pytest.raises(CheckpointError, match="layers.1.self_attn.rot_emb.inv_freq differs"):
        esm_fast.load(save_fair_esm(theirs, tmp_path / "a.pt"))
    ours = esm_fast.load(save_fair_esm(fair_esm(64, 4), tmp_path / "b.pt"))[0]
    with pytest.raises(ValueError, match="different rotary frequencies"):
        ours.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="different rotary frequencies"):
        esm_fast.accelerate(theirs)


def test_a_file_without_frequencies_is_refused(tmp_path):
    path = save_fair_esm(fair_esm(64, 4), tmp_path / "a.pt")
    content = torch.load(path, weights_only=False)
    content["model"] = {key: value for key, value in content["model"].items() if "inv_freq" not in key}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="a.pt: it holds no rotary frequencies"):
        esm_fast.load(path)


def test_accelerated_fair_esm_computes_the_same():
    theirs = fair_esm(48, 2)
    tokens = tokens_of(PROTEINS)
    real = tokens != 1
    with torch.no_grad():
        wanted = theirs(tokens, repr_layers=[2], return_contacts=True)
        got = esm_fast.accelerate(theirs)(tokens, repr_layers=[2], return_contacts=True)
    close(got["representations"][2][real], wanted["representations"][2][real])
    close(got["contacts"], wanted["contacts"], 1e-5)
    assert type(esm_fast.unaccelerate(theirs)).__module__ == "esm.model.esm2"


# ---- against transformers


@pytest.mark.parametrize("head_dim", SHAPES)
def test_all_results_are_transformers(head_dim, tmp_path):
    theirs = hugging_face("EsmForMaskedLM", *SHAPES[head_dim])
    theirs.save_pretrained(tmp_path / "hf")
    ours = esm_fast.EsmForMaskedLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    tokens = tokens_of(PROTEINS)
    mask = (tokens != 1).long()
    mask[2, 40:45] = 0  # a hole
    options = dict(attention_mask=mask, output_hidden_states=True, output_attentions=True)
    with torch.no_grad():
        wanted, got = theirs(tokens, **options), ours(tokens, **options)
        loaded, _ = esm_fast.load(tmp_path / "hf")
        plain = loaded(tokens)["logits"]
        reference = theirs(tokens, attention_mask=(tokens != 1).long()).logits
    real = mask.bool()
    close(got.logits[real], wanted.logits[real])
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        close(a[real], b[real])
    pairs = (real[:, None, :, None] & real[:, None, None, :]).expand(wanted.attentions[0].shape)
    close(got.attentions[1][pairs], wanted.attentions[1][pairs])
    close(plain[tokens != 1], reference[tokens != 1])


def test_left_padding_and_given_positions_are_transformers():
    theirs = hugging_face("EsmModel", 64, 4)
    tokens = tokens_of([("a", protein(20)), ("b", protein(7))]).roll(6, 1)
    mask = (tokens != 1).long()
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape).flip(1) * 3
    for options in ({}, {"position_ids": positions}, {"inputs_embeds": torch.randn(*tokens.shape, 64)}):
        ids = None if "inputs_embeds" in options else tokens
        with torch.no_grad():
            wanted = theirs(ids, mask, **options).last_hidden_state
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                got = esm_fast.accelerate(theirs)(ids, mask, **options).last_hidden_state
        esm_fast.unaccelerate(theirs)
        close(got[mask.bool()], wanted[mask.bool()])


@pytest.mark.parametrize("keys", ["star", "per layer", "one", "bin", "shards"])
def test_every_form_of_hugging_faces_folders(keys, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = hugging_face("EsmForMaskedLM", 64, 4)
    folder = tmp_path / "hf"
    theirs.save_pretrained(folder, **(dict(max_shard_size="100KB") if keys == "shards" else {}))
    if keys != "shards":
        state = load_file(folder / "model.safetensors")
        frequencies = next(state.pop(key) for key in list(state) if key.endswith("inv_freq"))
        names = {
            "star": ["esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq"],
            "per layer": [f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq" for i in (0, 1)],
        }.get(keys, ["esm.rotary_embeddings.inv_freq"])
        state |= {name: frequencies.clone() for name in names}
        state["esm.embeddings.position_embeddings.weight"] = torch.zeros(1026, 64)  # which means nothing
        (folder / "model.safetensors").unlink()
        if keys == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        assert (folder / "model.safetensors.index.json").exists()
    ours, _ = esm_fast.load(folder)
    tokens = tokens_of(PROTEINS)
    with torch.no_grad():
        wanted = theirs(tokens, (tokens != 1).long()).logits
    close(ours(tokens)["logits"].detach()[tokens != 1], wanted[tokens != 1])


@pytest.mark.parametrize("kind", ["EsmForSequenceClassification", "EsmForTokenClassification"])
def test_a_classifiers_folder_is_the_encoder_it_holds(kind, tmp_path):
    theirs = hugging_face(kind, 64, 4)
    theirs.save_pretrained(tmp_path / "hf")
    with pytest.warns(UserWarning, match="no language-model head"):
        ours, _ = esm_fast.load(tmp_path / "hf")
    tokens = tokens_of(PROTEINS)
    real = tokens != 1
    with torch.no_grad():
        wanted = theirs.esm(tokens, real.long()).last_hidden_state
        got = ours(tokens, repr_layers=[2])
    close(got["representations"][2][real], wanted[real])
    assert "logits" not in got


# ---- half precision


def relative(got, truth) -> float:
    return float((got.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())


HALVES = [
    (64, torch.bfloat16, 2.3e-2),
    (64, torch.float16, 4e-3),
    (16, torch.bfloat16, 2.3e-2),
    (24, torch.bfloat16, 2.3e-2),
]


@pytest.mark.parametrize(("head_dim", "dtype", "bound"), HALVES)
def test_half_precision_is_as_right_at_four_thousand_tokens_as_at_64(head_dim, dtype, bound, tmp_path):
    path = save_fair_esm(fair_esm(*SHAPES[head_dim]), tmp_path / "a.pt")
    half, truth = (esm_fast.load(path, dtype=kind)[0] for kind in (dtype, torch.float64))
    assert half.layers[0].self_attn.rot_emb.inv_freq.dtype == torch.float32
    errors = {}
    for length in (62, 1022, 4094):
        tokens = tokens_of([("a", protein(length))])
        with torch.no_grad():
            got, wanted = (m(tokens, repr_layers=[2])["representations"][2] for m in (half, truth))
        errors[length] = relative(got, wanted)
    assert max(errors.values()) < bound, errors
    assert max(errors.values()) < 1.5 * errors[62], errors


def test_converting_a_model_leaves_its_frequencies(tmp_path):
    for model in (esm_fast.load("random:esm2_t6_8M_UR50D")[0],):
        before = model.layers[0].self_attn.rot_emb.inv_freq.clone()
        for convert in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()):
            convert(model)
            assert torch.equal(model.layers[3].self_attn.rot_emb.inv_freq, before)
    theirs = esm_fast.accelerate(hugging_face("EsmForMaskedLM", 64, 4))
    before = theirs.esm.rotary_embeddings.inv_freq.clone()
    assert torch.equal(theirs.bfloat16().esm.rotary_embeddings.inv_freq, before)


def test_half_tables_are_refused():
    case = next(case for case in ops.OPS["pre_ln_attention"].cases() if case.name == "rotary_64")
    arguments = case.build(torch.bfloat16, "cpu", 0)
    assert arguments["rotary"].dtype == torch.float32
    with pytest.raises(ValueError, match="rotary.* must be float32"):
        ops.pre_ln_attention(**arguments | {"rotary": arguments["rotary"].bfloat16()})


# ---- no positions are dropped, and no limit stands in the way


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_fused_stack_turns(dtype):
    """A stack that forgot the tables would give a protein and its reverse the same mean."""
    model, _ = esm_fast.load("random:esm2_t6_8M_UR50D", dtype=dtype, backend="cpu")
    text = protein(100)
    (_, one), (_, other) = esm_fast.embed(model, [("a", text), ("b", text[::-1])])
    assert np.abs(one[-1] - other[-1]).max() > 0.05 * np.abs(one[-1]).max()


def test_the_stack_is_the_layers():
    case = next(case for case in ops.OPS["transformer_stack"].cases() if case.name == "rotary")
    arguments = case.build(torch.float32, "cpu", 0)
    with torch.no_grad():
        got = ops.transformer_stack(**arguments, backend="cpu")[0]
        wanted = ops.transformer_stack(**arguments, backend="reference")[0]
        without = ops.transformer_stack(**arguments | {"rotary": None}, backend="reference")[0]
    close(got, wanted, 1e-5)
    assert float((without - wanted).abs().max()) > 1e-2


def test_long_proteins_run_whole_and_are_cut_on_request():
    model, _ = esm_fast.load("random:esm2_t6_8M_UR50D", dtype="bfloat16")
    text = protein(1500)
    found = {how: next(iter(esm_fast.embed(model, [text], overlength=how)))[1][-1] for how in ("error", "window")}
    cut = next(iter(esm_fast.embed(model, [text], overlength="truncate")))[1][-1]
    first = next(iter(esm_fast.embed(model, [text[:1022]])))[1][-1]
    assert np.array_equal(cut, first)
    assert not np.array_equal(found["error"], found["window"]) and not np.array_equal(found["error"], cut)


GOLDEN = [[8.9215, -10.5898, -6.4671], [-6.3967, -13.9114, -1.1212], [-7.7812, -13.9516, -3.7406]]


def test_without_a_mask_padding_is_a_token_as_in_transformers():
    """As the golden numbers below were made: <pad> is in the input and no mask is given."""
    theirs = hugging_face("EsmForMaskedLM", 64, 4)
    with torch.no_grad():
        wanted = theirs(torch.arange(6)[None]).logits
        got = esm_fast.accelerate(theirs)(torch.arange(6)[None]).logits
    close(got, wanted)


@pytest.mark.weights
def test_golden_logits_of_the_published_weights():
    """Those that transformers tests its own ESM-2 with, from facebook/esm2_t6_8M_UR50D."""
    pytest.importorskip("transformers")
    path = hub.cached("esm2_t6_8M_UR50D")
    if path is None or not path.is_dir():
        pytest.skip("facebook/esm2_t6_8M_UR50D is not in Hugging Face's cache: its golden logits were not compared")
    model = esm_fast.EsmForMaskedLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(torch.arange(6)[None]).logits
    np.testing.assert_allclose(logits[0, :3, :3].numpy(), GOLDEN, atol=1e-3)


# ---- our own files, names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_files_come_back(dtype, tmp_path):
    model = esm_fast.load("random:esm2_t6_8M_UR50D", dtype=dtype)[0]
    weights.save(model, tmp_path / "a.safetensors")
    copy = esm_fast.load(tmp_path / "a.safetensors", dtype=dtype)[0]
    assert copy.config == model.config and type(copy) is type(model)
    for (key, one), other in zip(model.state_dict().items(), copy.state_dict().values(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), key
    assert [key for key in weights.read(tmp_path / "a.safetensors").tensors if "inv_freq" in key] == [KEY]


def test_names_and_functions():
    assert {"esm2_t6_8M_UR50D", "esm2_t48_15B_UR50D"} <= set(dir(esm_fast.pretrained))
    assert family.canonical_name("facebook/esm2_t36_3B_UR50D") == "esm2_t36_3B_UR50D"
    sizes = {name: (c.layers, c.embed_dim, c.attention_heads, c.head_dim) for name, c in CONFIGS.items()}
    assert sizes["esm2_t12_35M_UR50D"] == (12, 480, 20, 24) and sizes["esm2_t48_15B_UR50D"] == (48, 5120, 40, 128)
    with pytest.raises(ValueError, match="even head dimension"):
        Config(1, 6, 24, 2)
    assert dataclasses.asdict(CONFIGS["esm2_t6_8M_UR50D"])["family"] == "esm2"


def test_neighbours_change_no_bit():
    model, _ = esm_fast.load("random:esm2_t6_8M_UR50D", backend="cpu")
    parts = [protein(n, n) for n in (5, 200, 1, 77)]
    together = [found[-1] for _, found in esm_fast.embed(model, parts)]
    for text, wanted in zip(parts, together, strict=True):
        ((_, alone),) = esm_fast.embed(model, [text])
        assert np.array_equal(alone[-1], wanted)


def test_an_empty_batch_has_no_tables():
    model, _ = esm_fast.load("random:esm2_t6_8M_UR50D")
    nothing = np.zeros(0, dtype=np.int64)
    out = model.forward_packed(pack(np.zeros(0, np.uint8), nothing, nothing, nothing), layers=(6,))
    assert out.representations[6].shape == (0, 320)
