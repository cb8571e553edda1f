"""Numbers, functions and classes that users set on a model: what fair-esm computes then, or an error; never silence."""

import copy
import warnings

import pytest
import torch
from fakes import SEQUENCES, fair_esm_model, hf_model, save_fair_esm, trained_like
from torch import nn

import esm_fast
from esm_fast import weights
from esm_fast.models import layers
from esm_fast.models.attached import NotPackable, NotPackedWarning
from esm_fast.models.esm2 import Config
from esm_fast.models.padded import api_class

esm = pytest.importorskip("esm", reason="fair-esm is not installed")
TOKENS = esm_fast.Alphabet.from_architecture("ESM-1b").get_batch_converter()(SEQUENCES[:3])[2]
RESIDUES = [int((row > 3).sum()) for row in TOKENS]


def esm1(folder):
    theirs = fair_esm_model()
    return theirs, esm_fast.load(save_fair_esm(theirs, folder / "tiny.pt"), packed=False)[0]


def esm2(folder):
    torch.manual_seed(0)
    theirs = trained_like(esm.ESM2(num_layers=3, embed_dim=32, attention_heads=4))
    ours = api_class(Config(3, 32, 128, 4))(Config(3, 32, 128, 4)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture(params=["esm1", "esm2", "esm1, accelerated", "esm2, accelerated"], scope="module")
def pair(request, tmp_path_factory):
    """(fair-esm's model, ours)"""
    kind, _, accelerated = request.param.partition(", ")
    theirs, ours = {"esm1": esm1, "esm2": esm2}[kind](tmp_path_factory.mktemp("models"))
    return theirs, esm_fast.accelerate(copy.deepcopy(theirs)) if accelerated else ours


def rotations(model):
    return [layer.self_attn.rot_emb for layer in model.layers]


def scale_every(model):
    for rotation in rotations(model):
        rotation.inv_freq.mul_(0.7)


EDITS = {
    "token_dropout": lambda m: setattr(m.args if hasattr(m, "args") else m, "token_dropout", False),
    "embed_scale": lambda m: setattr(m, "embed_scale", 2),
    "mask_idx": lambda m: setattr(m, "mask_idx", 24),
    "padding_idx": lambda m: setattr(m, "padding_idx", 20),
    "scaling": lambda m: setattr(m.layers[1].self_attn, "scaling", 1.0),
    "norm without gain": lambda m: setattr(m.layers[1].final_layer_norm, "weight", None),
    "norm without bias": lambda m: setattr(m.layers[1].self_attn_layer_norm, "bias", None),
    "eps in a layer": lambda m: setattr(m.layers[1].final_layer_norm, "eps", 0.5),
    "eps before": lambda m: setattr(getattr(m, "emb_layer_norm_before", m.emb_layer_norm_after), "eps", 0.5),
    "eps of the head": lambda m: setattr(m.lm_head.layer_norm, "eps", 0.5),
    "max_norm": lambda m: setattr(m.embed_tokens, "max_norm", 0.1),
    "table of its own": lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.detach() * 2)),
    "activation": lambda m: setattr(m.contact_head, "activation", nn.Tanh()),
    "eos_idx": lambda m: setattr(m.contact_head, "eos_idx", 20),
    "one layer twice": lambda m: m.layers.__setitem__(1, m.layers[0]),
    "one rotation": lambda m: rotations(m)[1].inv_freq.mul_(0.3),
    "every rotation": scale_every,
    "no rotation": lambda m: setattr(m.layers[1].self_attn, "rot_emb", None),
}


def attention_with(**numbers):
    return lambda m: [setattr(m.layers[1].self_attn, name, value) for name, value in numbers.items()]


ONES = nn.Parameter(torch.ones(1, 1, 32))
ATTENTIONS = {
    "one head": attention_with(num_heads=1, head_dim=32),
    "zero_attn": attention_with(add_zero_attn=True),
    "bias_k": attention_with(bias_k=ONES, bias_v=ONES),
    "dropout": attention_with(dropout=1.0, training=True),
}


def computed(model):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotPackedWarning)
        found = model(TOKENS, repr_layers=[3], return_contacts=True)
    contacts = [maps[:n, :n] for maps, n in zip(found["contacts"], RESIDUES, strict=True)]
    return torch.cat([found["logits"][TOKENS != 1].flatten(), *map(torch.flatten, contacts)])


@pytest.mark.parametrize("edit", EDITS)
def test_a_number_that_is_set_has_its_effect_or_is_refused(pair, edit):
    theirs, ours = map(copy.deepcopy, pair)
    if "rotation" in edit and rotations(theirs)[0] is None:
        pytest.skip("its positions are not rotary")
    EDITS[edit](theirs)
    try:
        EDITS[edit](ours)
    except AttributeError as error:
        assert "cannot be set" in str(error)
        return
    wanted = computed(theirs)
    torch.testing.assert_close(computed(ours), wanted, rtol=0, atol=2e-4)
    assert (wanted - computed(pair[1])).abs().max() > 1e-3


@pytest.mark.parametrize("edit", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_of_another_kind_is_called_or_refused(pair, edit):
    """Its maps have other shapes than those of the other layers, so that there are no contacts."""
    theirs, ours = map(copy.deepcopy, pair)
    if edit is ATTENTIONS["one head"] and rotations(theirs)[0] is not None:
        pytest.skip("its rotation is of another size")
    edit(theirs)
    if type(ours.layers[1]).__module__.startswith("esm_fast."):
        with pytest.raises(AttributeError, match="cannot be set"):
            edit(ours)
        return
    edit(ours)
    with torch.no_grad(), pytest.warns(NotPackedWarning):
        torch.testing.assert_close(ours(TOKENS)["logits"], theirs(TOKENS)["logits"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("positions", ["absolute", "rotary"])
def test_numbers_of_transformers_modules_have_their_effect(positions):
    plain = hf_model(position_embedding_type=positions, emb_layer_norm_before=positions == "absolute").eval()
    attention = ("scaling", 0.3), ("is_causal", True), ("num_attention_heads", 2), ("position_embedding_type", "none")
    edits = [lambda m, e=e: setattr(m.esm.encoder.layer[1].attention.self, *e) for e in attention]
    edits.append(lambda m: setattr(m.esm.embeddings, "padding_idx", 5))
    edits.append(lambda m: setattr(m.esm.encoder, "emb_layer_norm_after", nn.Identity()))
    for edit in edits:
        theirs, ours = copy.deepcopy(plain), esm_fast.accelerate(copy.deepcopy(plain))
        edit(theirs), edit(ours)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotPackedWarning)
            torch.testing.assert_close(ours(TOKENS[:1]).logits, theirs(TOKENS[:1]).logits, rtol=0, atol=3e-4)


def test_a_norm_that_no_model_of_a_family_has_is_not_passed_over():
    with pytest.raises(NotPackable, match="embeddings.layer_norm is there"):
        esm_fast.accelerate(hf_model(position_embedding_type="rotary", emb_layer_norm_before=True))


@pytest.mark.parametrize("kind", ["layer", nn.Linear, nn.LayerNorm])
def test_a_class_with_another_forward_is_called(pair, kind, monkeypatch):
    before = computed(pair[1])
    kinds = [esm.modules.TransformerLayer, layers.TransformerLayer] if kind == "layer" else [kind]
    for kind in kinds:
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda *a, f=forward, **k: _scaled(f(*a, **k)))
    theirs, ours = pair
    with pytest.warns(NotPackedWarning, match="was replaced"), torch.no_grad():
        ours(TOKENS)
    if kind is not nn.LayerNorm or "LayerNorm" in type(theirs.emb_layer_norm_after).__mro__[1].__name__:
        torch.testing.assert_close(computed(ours), computed(theirs), rtol=0, atol=2e-4)
    monkeypatch.undo()
    torch.testing.assert_close(computed(ours), before, rtol=0, atol=0)


def _scaled(output):
    return (output[0] * 1.1, *output[1:]) if isinstance(output, tuple) else output * 1.1


@pytest.mark.parametrize("edit", ["table of its own", "one rotation"])
def test_what_a_file_cannot_hold_is_not_saved(edit, tmp_path):
    _, ours = esm2(tmp_path)
    EDITS[edit](ours)
    with pytest.raises(weights.CheckpointError, match="differs from"):
        weights.save(ours, tmp_path / "m.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))
