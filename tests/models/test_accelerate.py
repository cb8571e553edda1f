"""`accelerate` on models a user already has: their own numbers, their own weights, and all of it undone."""

import argparse
import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from fakes import trained_like

from esm_fast import accelerate
from esm_fast.compat.accelerate import unaccelerate
from esm_fast.compat.shared import NotPackedWarning

IDS = torch.tensor(
    [
        [0, 20, 15, 11, 7, 10, 16, 9, 2],
        [0, 32, 5, 23, 13, 2, 1, 1, 1],
        [0, 20, 2, 1, 1, 1, 1, 1, 1],
        [0, 2, 1, 1, 1, 1, 1, 1, 1],
    ]
)
MASK = (IDS != 1).long()
VALID = IDS != 1


def hugging_face(kind="EsmModel", **options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")
    sizes = dict(vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
    tokens = dict(pad_token_id=1, mask_token_id=32, token_dropout=True, emb_layer_norm_before=True)
    config = transformers.EsmConfig(**sizes | tokens | dict(layer_norm_eps=1e-5) | options)
    return trained_like(getattr(transformers, kind)(config))


def fair_esm(arch="roberta_large", norm_before=True):
    esm = pytest.importorskip("esm", reason="fair-esm is not installed")
    sizes = dict(layers=2, embed_dim=32, ffn_embed_dim=37, attention_heads=4, max_positions=64)
    args = argparse.Namespace(
        **sizes, arch=arch, token_dropout=True, emb_layer_norm_before=norm_before, final_bias=True, logit_bias=True
    )
    alphabet = esm.Alphabet.from_architecture("ESM-1b" if arch == "roberta_large" else "ESM-1")
    model = trained_like(esm.ProteinBertModel(args, alphabet))
    with torch.no_grad():
        model.embed_tokens.weight[1] = 0
    return model


def packed(model, *args, **kwargs):
    """Calls a model and insists that it ran packed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotPackedWarning)
        return model(*args, **kwargs)


def ran(model, call):
    """How often esm_fast's own layers were computed during a call: with gradients they are, one by one."""
    from esm_fast.models.layers import TransformerLayer

    entered, packed = [], TransformerLayer.packed
    with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
        patch.setattr(
            TransformerLayer, "packed", lambda layer, *a, **k: entered.append(layer) or packed(layer, *a, **k)
        )
        call()
    return len(entered)


@pytest.mark.parametrize(
    "kind", ["EsmModel", "EsmForMaskedLM", "EsmForTokenClassification", "EsmForSequenceClassification"]
)
def test_hugging_face_models(kind):
    model = hugging_face(kind)
    field = "last_hidden_state" if kind == "EsmModel" else "logits"
    with torch.no_grad():
        before = model(IDS, MASK)[field]
        assert accelerate(model) is model
        after = packed(model, IDS, MASK)[field]
    if before.shape[:2] == IDS.shape:
        before, after = before[VALID], after[VALID]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert ran(model, lambda: model(IDS, MASK)) == 2


@pytest.mark.parametrize("norm_before", [True, False])
@pytest.mark.parametrize("maps, dtype, tolerance", [
    (True, torch.float32, 1e-4),
    (False, torch.float64, 1e-10),  # with maps fair-esm's softmax is in fp32
], ids=["fp32", "fp64"])  # fmt: skip
def test_fair_esm_models(norm_before, maps, dtype, tolerance):
    model = fair_esm(norm_before=norm_before).to(dtype)
    ask = dict(repr_layers=[2, 0, 1, 99], need_head_weights=maps, return_contacts=maps)
    with torch.no_grad():
        before = model(IDS, **ask)
        after = packed(accelerate(model), IDS, **ask)
        assert before.keys() == after.keys() and after["representations"].keys() == {0, 1, 2}
        torch.testing.assert_close(after["logits"][VALID], before["logits"][VALID], rtol=0, atol=tolerance)
        for layer, x in before["representations"].items():
            torch.testing.assert_close(after["representations"][layer][VALID], x[VALID], rtol=0, atol=tolerance)
        if maps:
            torch.testing.assert_close(after["attentions"], before["attentions"], rtol=0, atol=tolerance)
            some = ~before["contacts"].isnan()
            torch.testing.assert_close(after["contacts"][some], before["contacts"][some], rtol=0, atol=tolerance / 10)
            assert torch.equal(model.predict_contacts(IDS), after["contacts"])
    assert ran(model, lambda: model(IDS)) == 2


MODELS = pytest.mark.parametrize("make, call", [
    (lambda: hugging_face("EsmForMaskedLM"), lambda model: model(IDS, MASK)["logits"]),
    (lambda: hugging_face("EsmForTokenClassification"), lambda model: model(IDS, MASK)["logits"]),
    (fair_esm, lambda model: model(IDS)["logits"]),
], ids=["masked_lm", "token_classification", "fair_esm"])  # fmt: skip


@MODELS
def test_gradients(make, call):
    model = make()
    grads = []
    for change in (lambda m: m, accelerate):
        change(model).zero_grad()
        torch.nn.functional.cross_entropy(call(model)[VALID], IDS[VALID].flip(0) % 2).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    before, after = grads
    assert before.keys() == after.keys() and len(before) > 20
    for name, grad in before.items():
        torch.testing.assert_close(after[name], grad, rtol=1e-3, atol=1e-5, msg=f"gradient of {name}")


@MODELS
def test_undone_exactly(make, call):
    model = make()
    classes = [type(module) for module in model.modules()]
    state = {id(module): dict(vars(module)) for module in model.modules()}
    with torch.no_grad():
        before = call(model)
        accelerate(accelerate(model), backend="reference")
        call(model)
        assert unaccelerate(model) is model
        after = call(model)
    assert torch.equal(before, after)
    assert [type(module) for module in model.modules()] == classes
    assert all(vars(module) == state[id(module)] for module in model.modules())
    assert ran(model, lambda: call(model)) == 0
    assert unaccelerate(model) is model


@MODELS
def test_weights_are_shared(make, call):
    model = make()
    names = [name for name, _ in model.named_parameters()]
    where = [p.data_ptr() for p in model.parameters()]
    accelerate(model)
    with torch.no_grad():
        before = packed(call, model)
        assert [name for name, _ in model.named_parameters()] == names == list(dict(model.named_parameters()))
        assert [p.data_ptr() for p in model.parameters()] == where
        for parameter in model.parameters():
            parameter.mul_(1.1)
        changed = packed(call, model)
        assert (changed - before).abs().max() > 1e-2
        unaccelerate(model)
        torch.testing.assert_close(changed[VALID], call(model)[VALID], rtol=0, atol=1e-4)
        assert packed(call, accelerate(model).double()).dtype == torch.float64


@MODELS
def test_copies_and_pickles_stay_accelerated(make, call):
    model = accelerate(make(), backend="reference")
    with torch.no_grad():
        expected = call(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(packed(call, twin), expected)
            assert ran(twin, lambda twin=twin: call(twin)) == 2
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(call(model), expected)


def test_an_encoder_inside_another_module():
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.out = hugging_face(), torch.nn.Linear(32, 3)

        def forward(self, ids, mask):
            return self.out(self.trunk(ids, mask).last_hidden_state)

    model = Head().eval()
    with torch.no_grad():
        before = model(IDS, MASK)
        after = packed(accelerate(model), IDS, MASK)
    torch.testing.assert_close(after[VALID], before[VALID], rtol=0, atol=1e-4)
    assert ran(model, lambda: model(IDS, MASK)) == 2


def test_a_model_whose_hidden_states_were_recorded():
    """transformers leaves hooks behind when it records outputs; ours returns the same outputs without them."""
    model = hugging_face()
    model.set_attn_implementation("eager")
    ask = dict(output_hidden_states=True, output_attentions=True)
    with torch.no_grad():
        before = model(IDS, MASK, **ask)
        after = packed(accelerate(model), IDS, MASK, **ask)
        assert list(before) == list(after) and len(after.hidden_states) == 3
        for mine, theirs in zip(after.hidden_states, before.hidden_states, strict=True):
            torch.testing.assert_close(mine[VALID], theirs[VALID], rtol=0, atol=1e-4)
        again = model(IDS, MASK, **ask, packed=False)  # recorded by transformers, from a class it did not build
    assert [x.shape for x in again.attentions] == [x.shape for x in before.attentions]
    assert all(map(torch.equal, again.hidden_states, before.hidden_states))


def test_saved_from_an_accelerated_model(tmp_path):
    model = accelerate(hugging_face("EsmForTokenClassification"))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.architectures == ["EsmForTokenClassification"]
    with torch.no_grad():
        torch.testing.assert_close(again(IDS, MASK).logits[VALID], model(IDS, MASK).logits[VALID], rtol=0, atol=1e-4)


def test_fine_tuning_takes_the_same_steps():
    """A few steps of Adam with and without, from the same start."""
    losses = []
    for change in (lambda m: m, accelerate):
        options = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = change(hugging_face("EsmForTokenClassification", **options)).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        labels = (IDS % 2).masked_fill(~VALID, -100)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = packed(model, IDS, MASK, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[1][-1] < losses[1][0]


class Changed(torch.nn.Linear):
    pass


@pytest.mark.parametrize("make, path", [
    (hugging_face, "encoder.layer.1.attention.self.query"),
    (hugging_face, "encoder.layer.0.output.dense"),
    (fair_esm, "layers.1.self_attn.q_proj"),
    (fair_esm, "lm_head.dense"),
])  # fmt: skip
def test_a_changed_module_is_refused_then_and_later(make, path):
    model = make()
    parent, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    new = Changed(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    with torch.no_grad():
        inputs = (IDS, MASK) if make is hugging_face else (IDS,)
        before = next(iter(model(*inputs).values()))
        accelerate(model)
        setattr(model.get_submodule(parent), name, new)
        with pytest.warns(NotPackedWarning, match=f"{path} is .*Changed, not torch"):
            after = next(iter(model(*inputs).values()))
    torch.testing.assert_close(after[VALID], before[VALID], rtol=0, atol=1e-4)
    unaccelerate(model)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"{path} is .*Changed"):
        accelerate(model)
    assert [type(module) for module in model.modules()] == classes


def other_models():
    def subclass():
        model = hugging_face()
        model.__class__ = type("Own", (type(model),), {})
        return model

    return {
        "relative": (lambda: hugging_face(position_embedding_type="relative_key"), ValueError, "relative_key"),
        "decoder": (lambda: hugging_face("EsmForMaskedLM", is_decoder=True), ValueError, "is_decoder"),
        "mask": (lambda: hugging_face(mask_token_id=5), ValueError, "<mask> token is 5"),
        "padding": (lambda: hugging_face(pad_token_id=0), ValueError, "padding_idx 0"),
        "esm1": (lambda: fair_esm("protein_bert_base"), ValueError, "SinusoidalPositionalEmbedding"),
        "subclass": (subclass, TypeError, "Own holds none"),
        "linear": (lambda: torch.nn.Linear(2, 2), TypeError, "Linear holds none"),
    }


@pytest.mark.parametrize("case", other_models())
def test_other_models_are_refused(case):
    make, error, reason = other_models()[case]
    with pytest.raises(error, match=reason):
        accelerate(make())


def test_unknown_backend():
    model = hugging_face()
    with pytest.raises(ValueError, match="no backend 'nonsense'"):
        accelerate(model, backend="nonsense")
    assert type(model).__module__.startswith("transformers.")


def test_needs_neither_package():
    program = (
        "import sys; sys.modules['transformers'] = sys.modules['esm'] = None\n"
        "import torch, esm_fast\n"
        "try: esm_fast.accelerate(torch.nn.Linear(2, 2))\n"
        "except TypeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "needs one of ESM-1b" in done.stdout, done.stderr
