"""What users attach to a model has its effect, as in fair-esm, and where it costs the speed a warning says so."""

import copy
import warnings

import pytest
import torch
from fakes import SEQUENCES, save_fair_esm
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import esm_fast
from esm_fast.models.attached import NotPackedWarning

TOKENS = esm_fast.Alphabet.from_architecture("ESM-1b").get_batch_converter()(SEQUENCES[:3])[2]
VALID = TOKENS != 1
CALLED = ["embed_tokens", "layers.1", "layers.1.self_attn", "layers.1.self_attn_layer_norm", "layers.0.fc1",
          "layers.2.fc2", "layers.1.final_layer_norm", "emb_layer_norm_after", "lm_head", "lm_head.dense"]  # fmt: skip
PROJECTIONS = [f"layers.1.self_attn.{name}_proj" for name in ("q", "k", "v", "out")]  # fair-esm reads their weights


@pytest.fixture(scope="module")
def pair(fair_model, tmp_path_factory):
    path = save_fair_esm(fair_model, tmp_path_factory.mktemp("attached") / "tiny.pt")
    return fair_model, esm_fast.load(path, packed=False)[0]


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens)["logits"]


def without_warning(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotPackedWarning)
        return call(*args, **kwargs)


def scaled(output):
    return tuple(map(scaled, output)) if isinstance(output, tuple) else output * 1.5


def replace(model, path, new):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


class Halved(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, getattr(inner, "weight", None), getattr(inner, "bias", None)

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5


def forward_hook(model, path):
    model.get_submodule(path).register_forward_hook(lambda module, args, output: scaled(output))


def other_class(model, path):
    replace(model, path, Halved(model.get_submodule(path)))


def other_forward(model, path):
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))


@pytest.mark.parametrize("path", CALLED)
@pytest.mark.parametrize("attach", [forward_hook, other_class, other_forward])
def test_what_changes_a_module_changes_the_model_as_in_fair_esm(pair, attach, path):
    theirs, ours = map(copy.deepcopy, pair)
    before = logits(ours)
    for model in (theirs, ours):
        attach(model, path)
    with pytest.warns(NotPackedWarning, match=path.replace(".", r"\.")):
        mine = logits(ours)
    torch.testing.assert_close(mine[VALID], logits(theirs)[VALID], rtol=0, atol=1e-4)
    assert (mine - before).abs().max() > 1e-3


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("path", CALLED + PROJECTIONS)
def test_every_hook_is_called(pair, path, grad):
    ours, seen = copy.deepcopy(pair[1]), []
    module = ours.get_submodule(path)
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    if grad:
        module.register_full_backward_hook(lambda *_: seen.append("backward"))
    with torch.set_grad_enabled(grad), pytest.warns(NotPackedWarning):
        out = ours(TOKENS)["logits"]
    if grad:
        out.square().mean().backward()
    assert seen == ["before", "after"] + ["backward"] * grad


def test_hooks_for_all_modules_and_on_the_model_itself(pair):
    ours, seen = copy.deepcopy(pair[1]), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with pytest.warns(NotPackedWarning, match="all modules"):
            logits(ours)
    finally:
        handle.remove()
    assert seen.count("TransformerLayer") == 3 and seen.count("Linear") >= 18
    of_model = []
    ours.register_forward_hook(lambda module, args, result: of_model.append(1))
    without_warning(logits, ours)
    without_warning(lambda: list(esm_fast.embed(ours, ["MKV"])))
    assert of_model == [1, 1]


def spectral(model, path):
    parametrizations.spectral_norm(model.get_submodule(path))


def weight_norm(model, path):
    nn.utils.weight_norm(model.get_submodule(path))
    with torch.no_grad():
        model.get_submodule(path).weight_g.mul_(3)


def pruned(model, path):
    prune.l1_unstructured(model.get_submodule(path), "weight", amount=0.5)


def without_bias(model, path):
    model.get_submodule(path).bias = None


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def parametrized(model, path):
    parametrize.register_parametrization(model.get_submodule(path), "weight", Doubled())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("path", ["layers.0.fc1", "layers.2.fc2", "lm_head.dense"])
@pytest.mark.parametrize("attach", [spectral, weight_norm, pruned, parametrized, without_bias])
def test_what_makes_a_weight_anew_runs_packed(pair, attach, path):
    theirs, ours = map(copy.deepcopy, pair)
    before = logits(ours)
    for model in (theirs, ours):
        torch.manual_seed(0)
        attach(model, path)
    mine = without_warning(logits, ours)
    torch.testing.assert_close(mine[VALID], logits(theirs)[VALID], rtol=0, atol=1e-4)
    assert (mine - before).abs().max() > 1e-4
    without_warning(ours, TOKENS)["logits"].square().mean().backward()


@pytest.mark.parametrize("kept", [slice(2), slice(1, 3), slice(None, None, -1)])
def test_layers_can_be_taken_out_and_put_in_another_order(pair, kept):
    theirs, ours = map(copy.deepcopy, pair)
    for model in (theirs, ours):
        model.layers = nn.ModuleList(list(model.layers)[kept])
    with torch.no_grad():
        a, b = (model(TOKENS, repr_layers=range(4)) for model in (theirs, ours))
    assert a["representations"].keys() == b["representations"].keys()
    torch.testing.assert_close(b["logits"][VALID], a["logits"][VALID], rtol=0, atol=1e-4)
    if len(ours.layers) < 3:
        with pytest.raises(ValueError, match="fitted to 12 attention maps, this model has 8"):
            ours.predict_contacts(TOKENS)
    with torch.no_grad():
        ((_, embedded),) = esm_fast.embed(ours, [SEQUENCES[2][1]])
    row = b["representations"][len(ours.layers)][2, 1]
    torch.testing.assert_close(torch.from_numpy(embedded[-1]), row, rtol=0, atol=1e-4)


def test_unfused_is_fused(pair):
    """All that is returned, padded and packed, by a model with a hook that does nothing."""
    ours = pair[1]
    hooked = copy.deepcopy(ours)
    hooked.layers[0].register_forward_hook(lambda *_: None)
    ask = dict(repr_layers=[0, 1, 3], need_head_weights=True, return_contacts=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotPackedWarning)
        fused, unfused = ours(TOKENS, **ask), hooked(TOKENS, **ask)
        for name in ("logits", "attentions"):
            torch.testing.assert_close(unfused[name], fused[name], rtol=0, atol=1e-4)
        for i, n in enumerate((VALID.sum(1) - 2).tolist()):
            torch.testing.assert_close(unfused["contacts"][i, :n, :n], fused["contacts"][i, :n, :n], rtol=0, atol=1e-4)
        for layer, x in fused["representations"].items():
            torch.testing.assert_close(unfused["representations"][layer], x, rtol=0, atol=1e-4)
        for pool in ("mean", "per_residue"):
            a, b = (dict(esm_fast.embed(m, SEQUENCES[:3:2], pool=pool, layers=(0, -1))) for m in (ours, hooked))
            for label, found in a.items():
                for layer, x in found.items():
                    torch.testing.assert_close(torch.tensor(b[label][layer]), torch.tensor(x), rtol=0, atol=1e-4)


def test_unfused_is_as_exact_as_the_weights(pair):
    """In float64 nothing on the way is rounded to float32; token dropout's factor was, once."""
    plain = copy.deepcopy(pair[1]).double()
    hooked = copy.deepcopy(plain)
    hooked.layers[0].register_forward_hook(lambda *_: None)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotPackedWarning)
        torch.testing.assert_close(hooked(TOKENS)["logits"], plain(TOKENS)["logits"], rtol=0, atol=1e-12)


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter_configs():
    peft = pytest.importorskip("peft", reason="peft is not installed (extra: lora)")
    lora = dict(r=4, lora_alpha=16, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    ia3 = dict(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"])
    return {
        "lora": peft.LoraConfig(**lora),
        "bias": peft.LoraConfig(**lora, lora_bias=True),
        "dora": peft.LoraConfig(**lora, use_dora=True),
        "rslora": peft.LoraConfig(**lora, use_rslora=True),
        "all": peft.LoraConfig(**lora | {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}),
        "ia3": peft.IA3Config(**ia3, init_ia3_weights=False),
        "head": peft.LoraConfig(**lora | {"target_modules": ["dense"]}),
        "embedding": peft.LoraConfig(**lora | {"target_modules": ["embed_positions", "fc1"]}),
    }


@pytest.mark.parametrize("kind", ["lora", "bias", "dora", "rslora", "all", "ia3", "head", "embedding"])
def test_adapters_count_as_in_peft_and_stay_packed(pair, kind):
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(pair[1]), adapter_configs()[kind]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or "ia3" in name:
                parameter.mul_(1.5)
    wanted = logits(copy.deepcopy(model).merge_and_unload())
    mine = without_warning(logits, model)
    torch.testing.assert_close(mine[VALID], wanted[VALID], rtol=0, atol=1e-3)
    assert (mine - logits(pair[1])).abs().max() > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(without_warning(logits, model), logits(pair[1]), rtol=0, atol=1e-4)
    if kind != "embedding":
        model.merge_adapter()
        torch.testing.assert_close(without_warning(logits, model)[VALID], wanted[VALID], rtol=0, atol=1e-3)


def test_adapters_in_training(pair):
    """Gradients reach the adapters alone, those of the module's own forward; their dropout is applied."""
    import peft

    options = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(pair[1]), peft.LoraConfig(**options)).train()
    hooked = copy.deepcopy(model)
    hooked.base_model.model.layers[0].register_forward_hook(lambda *_: None)
    without_warning(model, TOKENS)["logits"][VALID].square().mean().backward()
    with pytest.warns(NotPackedWarning):
        hooked(TOKENS)["logits"][VALID].square().mean().backward()
    wanted = {name: p.grad for name, p in hooked.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys() and all("lora" in name for name in found) and len(found) == 12
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    dropping = peft.get_peft_model(copy.deepcopy(pair[1]), peft.LoraConfig(**options, lora_dropout=0.9)).train()
    assert not torch.equal(logits(dropping), logits(dropping))


# --- attention maps after contacts ------------------------------------------------------------------------------------


def test_attentions_after_contacts_are_computed_when_asked_for(pair):
    theirs, ours = map(copy.deepcopy, pair)
    with torch.no_grad():
        wanted, result = (model(TOKENS, return_contacts=True) for model in (theirs, ours))
    assert "attentions" in result and not dict.__contains__(result, "attentions")
    torch.testing.assert_close(result["attentions"], wanted["attentions"], rtol=0, atol=1e-4)
    assert dict.__contains__(result, "attentions") and not result.get("attentions").requires_grad
    with torch.no_grad():
        result = ours(TOKENS, return_contacts=True)
        ours.layers[0].fc1.weight.mul_(2)
    with pytest.raises(KeyError, match="need_head_weights=True"):
        result["attentions"]
    with pytest.raises(KeyError):
        logits_only = ours(TOKENS)
        logits_only["attentions"]
    assert logits_only.get("attentions") is None and "attentions" not in logits_only
