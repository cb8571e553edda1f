"""What is attached to a model, or edited, after it ran: seen as if it had been there at the first call."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from esm_fast import ops
from esm_fast.models import encoder
from esm_fast.models.esm1 import ESM1, Config
from esm_fast.ops.checked import Checked
from esm_fast.sequences.batching import pack

LENGTHS = np.array([9, 4])


def batch():
    ids = np.random.default_rng(0).integers(4, 24, LENGTHS.sum(), dtype=np.uint8)
    return pack(ids, LENGTHS.cumsum() - LENGTHS, LENGTHS, np.arange(2))


def model():
    torch.manual_seed(0)
    return ESM1(Config(3, 32, 64, 4, max_positions=32)).requires_grad_(False)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _replace(layer):
    layer.fc1 = nn.Sequential(layer.fc1, nn.Identity())


def _swap(layer):
    layer.fc1, layer.fc2 = layer.fc2, layer.fc1


def _hook_in_a_new_dictionary(layer):
    layer.fc2._forward_hooks = {0: lambda module, args, out: 2 * out}


def _new_class(layer):
    layer.fc1.__class__ = Doubled


def _own_forward(layer):
    layer.fc1.forward = lambda x: torch.zeros(*x.shape[:-1], 64)


def _set(name, make):
    def edit(layer):
        weight = layer.fc1.weight if name == "fc1" else layer.self_attn.q_proj.weight
        weight.data = make(weight.data)

    return edit


EDITS = {
    "replaced": _replace,
    "swapped": _swap,
    "hook": lambda layer: layer.fc2.register_forward_hook(lambda module, args, out: 2 * out),
    "hook in a new dictionary": _hook_in_a_new_dictionary,
    "another class": _new_class,
    "own forward": _own_forward,
    "scaling": lambda layer: setattr(layer.self_attn, "scaling", 0.5),
    "dropout": lambda layer: setattr(layer, "hidden_dropout", 0.5),
    "eps": lambda layer: setattr(layer.final_layer_norm, "eps", 0.3),
    "no bias": lambda layer: layer.fc1.register_parameter("bias", None),
    "parameter": lambda layer: setattr(layer.fc1, "weight", nn.Parameter(2 * layer.fc1.weight.data)),
    "values": lambda layer: layer.fc1.weight.data.mul_(2),
    "values of another type": _set("fc1", lambda weight: weight.to(torch.bfloat16)),
    "bits of another type": _set("fc1", lambda weight: weight.view(torch.int32)),
    "transposed": _set("q", lambda weight: weight.T),
    "fewer rows": _set("fc1", lambda weight: weight[:60]),
    "elsewhere": _set("fc1", lambda weight: 2 * weight),
    "freed": _set("fc1", lambda weight: torch.empty(0)),
    "negative": _set("q", lambda weight: torch._neg_view(weight)),
}


def outcome(model):
    """What a call gives, or why it does not; and what it warned of."""
    torch.manual_seed(1)
    with torch.inference_mode():
        try:
            return model.forward_packed(batch(), layers=(1, 3)).representations
        except Exception as error:
            return type(error), str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_counts_after_calls_as_before_them(edit, backend):
    ran, fresh = model(), model()
    ran.backend = fresh.backend = backend
    before = outcome(ran)
    outcome(ran), outcome(ran)
    edit(ran.layers[1]), edit(fresh.layers[1])
    got, wanted = outcome(ran), outcome(fresh)
    if isinstance(wanted, tuple):
        assert got == wanted
        return
    assert not torch.equal(wanted[3], before[3]) or edit is EDITS["replaced"]
    assert got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)


def test_layers_that_are_as_they_were_are_not_looked_at_again(monkeypatch):
    """Nor copied, pickled or kept alive by it; gradients go the long way."""
    ran = model()
    outcome(ran)
    monkeypatch.setattr(type(ran.layers[0]), "halves", None)
    first, second = outcome(ran), outcome(ran)
    assert torch.equal(first[3], second[3])
    glance = encoder._glances[ran]
    assert type(glance.first(3)) is Checked and glance.first(3) is glance.first(3)
    assert "glance" not in str(vars(ran)) and copy.deepcopy(ran) not in encoder._glances
    del glance, ran
    assert not [known for known in encoder._glances if type(known) is ESM1 and known.config.max_positions == 32]


def test_a_weight_in_the_middle_of_a_buffer_is_not_taken_for_aligned():
    ran = model()
    outcome(ran)
    outcome(ran)
    glance = encoder._glances[ran]
    assert glance.first(3).even
    bias = ran.layers[1].fc1.bias
    for offset in (1, 4):
        bias.data = torch.cat([torch.zeros(offset), bias.data])[offset:]
        outcome(ran)
        assert glance.first(3).even == (offset == 4)


def test_gradients_of_weights_are_seen_behind_checked_layers():
    ran = model()
    outcome(ran)
    ran.requires_grad_(True)
    x = ran.forward_packed(batch(), layers=(3,)).representations[3]
    x.sum().backward()
    assert ran.layers[0].fc1.weight.grad.abs().sum() > 0


def test_checked_layers_do_not_hide_what_is_wrong_with_the_rest():
    ran = model()
    outcome(ran), outcome(ran)
    x, ends = torch.zeros(13, 16), torch.tensor([0, 13], dtype=torch.int32)
    layers = encoder._glances[ran].first(3)
    with torch.inference_mode(), pytest.raises(ValueError, match="are wrong"):
        ops.transformer_stack(x, ends, 13, layers, 4)
