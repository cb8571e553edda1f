"""Hugging Face's API against transformers itself, in its eager attention: same arguments in, same numbers out."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from fakes import trained_like

import esm_fast
from esm_fast import hub, weights
from esm_fast.alphabet import EOS, MASK, PAD, TOKENS

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")
hf = pytest.importorskip("esm_fast.compat.hf")
from esm_fast.compat.shared import NotPackable, NotPackedWarning  # noqa: E402

TINY = dict(
    vocab_size=33,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=1026,
    pad_token_id=PAD,
    mask_token_id=MASK,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    layer_norm_eps=1e-5,
    token_dropout=True,
    emb_layer_norm_before=True,
)
SEQUENCES = ["MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDIA", "KALTARQ<mask>QEV<mask>FDLI", "M", "", "<mask>ACDXBUZO.-"]
CARD = "QERLKSIVRILE<mask>SLGYNIVAT"


def make(seed=0, kind="EsmForMaskedLM", **options):
    """A random model of transformers' own."""
    config = transformers.EsmConfig(**TINY | options)
    return trained_like(getattr(transformers, kind)._from_config(config, attn_implementation="eager"), seed)


def ours_from(theirs):
    """Our class with a copy of a model's weights and the default attention."""
    kind = getattr(hf, type(theirs).__name__)
    config = copy.deepcopy(theirs.config)
    config._attn_implementation = "sdpa"
    ours = kind(config).to(next(theirs.parameters()).dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval()


def pair(seed=0, **options):
    theirs = make(seed, **options)
    return theirs, ours_from(theirs)


def tokenized(sequences=SEQUENCES):
    return hf.EsmTokenizer()(sequences, return_tensors="pt", padding=True)


def packed(model, *args, **kwargs):
    """Calls a model and insists that it ran packed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotPackedWarning)
        return model(*args, **kwargs)


def assert_equal_outputs(theirs, ours, valid, tolerance):
    """Logits, hidden states and attentions, on valid rows; zeros elsewhere."""
    torch.testing.assert_close(ours.logits[valid], theirs.logits[valid], rtol=0, atol=tolerance)
    assert not ours.logits[~valid].any()
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for mine, reference in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine[valid], reference[valid], rtol=0, atol=tolerance)
        assert not mine[~valid].any()
    assert len(ours.attentions) == len(theirs.attentions) == 2
    both = valid[:, None, :, None] & valid[:, None, None, :]
    for mine, reference in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(mine, reference.masked_fill(~both, 0), rtol=0, atol=tolerance)


ASK = dict(output_hidden_states=True, output_attentions=True)
VARIANTS = pytest.mark.parametrize(
    "norm_before, token_dropout", [(True, True), (False, True), (True, False), (False, False)]
)


# --- numbers ----------------------------------------------------------------------------------------------------------


@VARIANTS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_ragged_batch_equals_transformers(norm_before, token_dropout, dtype, tolerance):
    theirs = make(1, emb_layer_norm_before=norm_before, token_dropout=token_dropout).to(dtype)
    ours, batch = ours_from(theirs), tokenized()
    with torch.no_grad():
        reference, mine = theirs(**batch, **ASK), packed(ours, **batch, **ASK)
        assert_equal_outputs(reference, mine, batch.attention_mask.bool(), tolerance)
        contacts = theirs.predict_contacts(batch.input_ids, batch.attention_mask)
        # Its NaN is 0 / 0: the empty sequence has no residue.
        some = ~contacts.isnan()
        assert some[[0, 1, 2, 4]].all()
        given = ours.predict_contacts(batch.input_ids, batch.attention_mask)
        torch.testing.assert_close(given[some], contacts[some], rtol=0, atol=tolerance / 10)
        torch.testing.assert_close(ours.predict_contacts(batch.input_ids), given, rtol=0, atol=0)
    assert mine.hidden_states[-1].dtype == mine.logits.dtype == mine.attentions[0].dtype == given.dtype == dtype


def test_attention_is_far_from_uniform():
    """Guards the tests themselves: with uniform attention most mistakes would pass."""
    batch = tokenized(SEQUENCES[:1])
    maps = torch.stack(make(1)(**batch, output_attentions=True).attentions)
    entropy = -(maps * maps.clamp_min(1e-12).log()).sum(-1).mean()
    assert entropy < 0.8 * torch.tensor(maps.shape[-1]).float().log()


def test_the_longest_sequence():
    theirs, ours = pair(2)
    batch = tokenized(["ACDEFGHIKL" * 102 + "MN", "ACD<mask>F"])
    with torch.no_grad():
        reference, mine = theirs(**batch), packed(ours, **batch)
    valid = batch.attention_mask.bool()
    assert valid.shape == (2, 1024)
    torch.testing.assert_close(mine.logits[valid], reference.logits[valid], rtol=0, atol=1e-4)


@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_random_ids_under_a_random_mask(seed, token_dropout):
    """Any id anywhere, <pad> and <mask> included, and holes in the mask, as transformers' own tests draw them."""
    theirs, ours = pair(3, token_dropout=token_dropout)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 33, (5, 7), generator=generator)
    mask = torch.randint(0, 2, (5, 7), generator=generator)
    mask[:, -1] = 1
    with torch.no_grad():
        reference, mine = theirs(ids, attention_mask=mask, **ASK), packed(ours, ids, attention_mask=mask, **ASK)
        assert_equal_outputs(reference, mine, mask.bool(), 1e-4)
        contacts = theirs.predict_contacts(ids, mask)
        some = ~contacts.isnan()
        given = ours.predict_contacts(ids, mask)
    torch.testing.assert_close(given[some], contacts[some], rtol=0, atol=1e-5)


def test_without_a_mask_every_token_counts():
    theirs, ours = pair(4)
    ids = tokenized().input_ids
    assert (ids == PAD).any()
    with torch.no_grad():
        reference, mine = theirs(ids, **ASK), packed(ours, ids, **ASK)
    assert_equal_outputs(reference, mine, torch.ones_like(ids, dtype=torch.bool), 1e-4)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int32])
def test_any_type_of_mask(kind):
    theirs, ours = pair(5)
    batch = tokenized()
    mask = batch.attention_mask.to(kind)
    with torch.no_grad():
        reference, mine = theirs(batch.input_ids, mask), packed(ours, batch.input_ids, mask)
    valid = mask.bool()
    torch.testing.assert_close(mine.logits[valid], reference.logits[valid], rtol=0, atol=1e-4)


def test_positions_count_what_is_not_padding():
    """Left padding moves nothing; position_ids, also one row for all, override the count."""
    theirs, ours = pair(6)
    ids = torch.tensor([[PAD, PAD, 0, 5, 6, 7, 2], [0, 8, PAD, 9, 10, 11, 2]])
    mask = (ids != PAD).long()
    with torch.no_grad():
        for position_ids in (None, torch.tensor([[9, 8, 7, 6, 5, 4, 3]]), torch.arange(14).view(2, 7) + 2):
            reference = theirs(ids, mask, position_ids=position_ids)
            mine = packed(ours, ids, mask, position_ids=position_ids)
            torch.testing.assert_close(mine.logits[mask.bool()], reference.logits[mask.bool()], rtol=0, atol=1e-4)
        alone = packed(ours, ids[:1, 2:])
        torch.testing.assert_close(alone.logits, packed(ours, ids, mask).logits[:1, 2:], rtol=0, atol=1e-4)


def test_embeddings_in_place_of_ids():
    theirs, ours = pair(7)
    embeds = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0, 1, 1, 0, 1, 1, 1]])
    with torch.no_grad():
        reference = theirs(inputs_embeds=embeds, attention_mask=mask, **ASK)
        mine = packed(ours, inputs_embeds=embeds, attention_mask=mask, **ASK)
    assert_equal_outputs(reference, mine, mask.bool(), 1e-4)


@VARIANTS
def test_gradients_equal_transformers(norm_before, token_dropout):
    theirs, ours = pair(8, emb_layer_norm_before=norm_before, token_dropout=token_dropout)
    batch = tokenized()
    labels = batch.input_ids.roll(1, 0).masked_fill(batch.attention_mask == 0, -100)
    for model, call in ((theirs, theirs), (ours, lambda **k: packed(ours, **k))):
        model.zero_grad()
        call(**batch, labels=labels).loss.backward()
    for (name, reference), mine in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if reference.grad is None:
            assert mine.grad is None, name
        else:
            assert mine.grad is not None, name
            torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-3, atol=1e-5, msg=f"gradient of {name}")


def test_gradients_reach_the_contact_regression_and_the_queries():
    theirs, ours = pair(9)
    batch = tokenized(SEQUENCES[:2])
    theirs.predict_contacts(**{"tokens": batch.input_ids, "attention_mask": batch.attention_mask}).sum().backward()
    ours.predict_contacts(batch.input_ids, batch.attention_mask).sum().backward()
    for name in ("contact_head.regression.weight", "encoder.layer.0.attention.self.query.weight"):
        reference, mine = theirs.esm.get_parameter(name).grad, ours.esm.get_parameter(name).grad
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_transformers_is(dtype):
    theirs, ours = pair(10)
    batch = tokenized()
    valid = batch.attention_mask.bool()
    with torch.no_grad():
        exact = theirs(**batch).logits[valid]
        reference, mine = theirs.to(dtype)(**batch).logits[valid], packed(ours.to(dtype), **batch)
    assert mine.logits.dtype == dtype
    assert (mine.logits[valid] - exact).abs().mean() <= 1.1 * (reference - exact).abs().mean()


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_shapes_and_fields():
    ours = ours_from(make(11))
    ids = torch.randint(4, 24, (13, 7))
    output = packed(ours, ids, labels=ids, **ASK)
    assert isinstance(output, transformers.modeling_outputs.MaskedLMOutput)
    assert list(output) == ["loss", "logits", "hidden_states", "attentions"]
    assert output.logits.shape == (13, 7, 33) and output.loss.shape == ()
    assert [x.shape for x in output.hidden_states] == [(13, 7, 32)] * 3
    assert [x.shape for x in output.attentions] == [(13, 4, 7, 7)] * 2
    assert ours.predict_contacts(ids).shape == (13, 5, 5)
    assert list(packed(ours, ids)) == ["logits"]


def test_encoder_alone_with_and_without_pooler():
    theirs, ours = pair(12, kind="EsmModel")
    batch = tokenized()
    with torch.no_grad():
        reference, mine = theirs(**batch, **ASK), packed(ours, **batch, **ASK)
    assert list(mine) == list(reference)
    assert {"last_hidden_state", "pooler_output", "hidden_states", "attentions"} <= set(mine)
    torch.testing.assert_close(mine.pooler_output, reference.pooler_output, rtol=0, atol=1e-4)
    assert mine.hidden_states[-1] is mine.last_hidden_state
    bare = hf.EsmModel(ours.config, add_pooling_layer=False).eval()
    assert packed(bare, **batch).pooler_output is None


def test_tuples():
    theirs, ours = pair(13)
    batch = tokenized()
    for options in ({}, ASK, {"labels": batch.input_ids.masked_fill(batch.attention_mask == 0, -100)}):
        reference = theirs(**batch, **options, return_dict=False)
        mine = packed(ours, **batch, **options, return_dict=False)
        assert type(mine) is tuple and len(mine) == len(reference)
    ours.config.return_dict = False
    assert type(packed(ours, **batch)) is tuple
    assert not isinstance(packed(ours, **batch, return_dict=True), tuple)


def test_outputs_asked_for_in_the_configuration():
    ours = hf.EsmForMaskedLM(transformers.EsmConfig(**TINY, output_hidden_states=True)).eval()
    ids = torch.tensor([[0, 5, 6, 2]])
    assert len(packed(ours, ids).hidden_states) == 3
    assert packed(ours, ids, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("asked, present", [(1, [1]), ([-1, 0], [0, 2]), ([7], [])])
def test_selected_hidden_states(asked, present):
    """A number or a list asks for some of them, as in recent versions of transformers."""
    ours = ours_from(make(14))
    batch = tokenized()
    everything = packed(ours, **batch, output_hidden_states=True).hidden_states
    mine = packed(ours, **batch, output_hidden_states=asked).hidden_states
    assert len(mine) == 3 and [i for i, x in enumerate(mine) if x is not None] == present
    assert all(torch.equal(mine[i], everything[i]) for i in present)


def test_loss_ignores_minus_100():
    theirs, ours = pair(15)
    batch = tokenized()
    labels = torch.full_like(batch.input_ids, -100)
    labels[1, 3], labels[4, 1] = 7, 20
    with torch.no_grad():
        reference, mine = theirs(**batch, labels=labels), packed(ours, **batch, labels=labels)
    torch.testing.assert_close(mine.loss, reference.loss, rtol=0, atol=1e-5)
    by_hand = torch.nn.functional.cross_entropy(mine.logits[[1, 4], [3, 1]], torch.tensor([7, 20]))
    torch.testing.assert_close(mine.loss, by_hand)


def test_one_kept_token_and_none():
    theirs, ours = pair(16)
    ids = torch.tensor([[0, 5, 6, 2], [0, 5, 6, 2]])
    mask = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])
    with torch.no_grad():
        mine = packed(ours, ids, mask)
        reference = theirs(ids, mask).logits[0, 2]
    torch.testing.assert_close(mine.logits[0, 2], reference, rtol=0, atol=1e-4)
    assert not mine.logits[1].any()


def test_wrong_inputs_are_named():
    ours = ours_from(make(17))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        ours()
    with pytest.raises(ValueError, match="input_ids must be 0 to 32, got 0 to 33"):
        ours(torch.tensor([[0, 33, 2]]))
    with pytest.raises(ValueError, match="positions must be 0 to 1025, got 2 to 1026"):
        ours(torch.full((1, 1025), 5))
    with pytest.raises(ValueError, match="no contact regression"):
        torch.nn.init.zeros_(ours.esm.contact_head.regression.weight)
        ours.predict_contacts(torch.tensor([[0, 5, 2]]))


# --- what cannot run packed runs on transformers' code, and says so ---------------------------------------------------


class Doubled(torch.nn.Linear):
    """A linear layer that is none: what LoRA and quantisation put in its place."""

    def forward(self, x):
        return 2 * super().forward(x)


def replace_query(model):
    old = model.esm.encoder.layer[1].attention.self.query
    new = Doubled(32, 32)
    new.load_state_dict(old.state_dict())
    model.esm.encoder.layer[1].attention.self.query = new


def add_hook(model):
    model.esm.encoder.layer[0].intermediate.register_forward_hook(lambda module, args, output: output * 1.5)


def replace_forward(model):
    dense = model.esm.encoder.layer[0].output.dense
    dense.forward = lambda x: 2 * torch.nn.functional.linear(x, dense.weight, dense.bias)


def replace_head(model):
    model.lm_head.dense = torch.nn.Sequential(model.lm_head.dense, torch.nn.Tanh())


def parametrize(model):
    torch.nn.utils.parametrizations.weight_norm(model.esm.encoder.layer[0].attention.self.key)


CHANGES = {
    replace_query: r"encoder\.layer\.1\.attention\.self\.query is .*Doubled",
    add_hook: r"encoder\.layer\.0\.intermediate has a hook",
    replace_forward: r"forward of encoder\.layer\.0\.output\.dense was replaced",
    replace_head: r"lm_head\.dense is .*Sequential",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_module_is_never_passed_over(change):
    theirs, ours = pair(18)
    batch = tokenized()
    valid = batch.attention_mask.bool()
    with torch.no_grad():
        before = packed(ours, **batch).logits[valid]
        for model in (theirs, ours):
            change(model)
        reference = theirs(**batch).logits[valid]
        with pytest.warns(NotPackedWarning, match=CHANGES[change]):
            mine = ours(**batch).logits[valid]
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)
    assert (reference - before).abs().max() > 1e-2


def test_hooks_on_the_whole_encoder_run():
    ours = ours_from(make(18))
    seen = []
    ours.esm.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    packed(ours, **tokenized())
    assert len(seen) == 1


def test_a_parametrized_matrix_runs_packed():
    theirs, ours = pair(18)
    batch = tokenized()
    for model in (theirs, ours):
        parametrize(model)
        with torch.no_grad():
            model.esm.encoder.layer[0].attention.self.key.parametrizations.weight.original0.mul_(3)
    valid = batch.attention_mask.bool()
    with torch.no_grad():
        torch.testing.assert_close(
            packed(ours, **batch).logits[valid], theirs(**batch).logits[valid], rtol=0, atol=1e-4
        )


def losses(model, batch, count):
    torch.manual_seed(0)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return torch.stack([packed(model, **batch, labels=labels).loss.detach() for _ in range(count)])


@pytest.mark.parametrize("hidden, attention", [(0.3, 0.0), (0.0, 0.3), (0.2, 0.2)])
def test_dropout_in_training_is_applied_to_packed_rows(hidden, attention):
    """Two models draw other numbers, but from one distribution: that of transformers' losses."""
    theirs, ours = pair(19, hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention)
    batch = tokenized()
    with torch.no_grad():
        torch.testing.assert_close(losses(ours, batch, 1), losses(theirs, batch, 1), rtol=0, atol=1e-4)  # in eval()
        mine, reference = losses(ours.train(), batch, 150), losses(theirs.train(), batch, 150)
    assert mine.std() > 0 and len(mine.unique()) > 100
    noise = ((mine.var() + reference.var()) / 150).sqrt()
    assert (mine.mean() - reference.mean()).abs() < 4 * noise
    assert 0.6 < mine.std() / reference.std() < 1.6
    packed(ours, **batch, labels=batch.input_ids.masked_fill(batch.attention_mask == 0, -100)).loss.backward()
    assert ours.esm.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("requires_grads", [True, False])
def test_gradient_checkpointing_trains_packed(requires_grads):
    theirs, ours = pair(20)
    batch = tokenized()
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    ours.gradient_checkpointing_enable()
    if not requires_grads:
        ours.disable_input_require_grads()  # a hook on the embeddings, which changes no number
    loss = packed(ours.train(), **batch, labels=labels).loss
    loss.backward()
    expected = theirs(**batch, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_labels_under_the_mask_count_as_in_transformers():
    theirs, ours = pair(21)
    batch = tokenized()
    with pytest.warns(NotPackedWarning, match="labels where attention_mask is 0"):
        mine = ours(**batch, labels=batch.input_ids).loss
    torch.testing.assert_close(mine, theirs(**batch, labels=batch.input_ids).loss, rtol=0, atol=1e-4)


def masks():
    allowed = torch.ones(2, 1, 4, 4)
    allowed[:, :, :, -1] = 0
    additive = (1 - allowed) * torch.finfo(torch.float32).min
    return {"four_dimensions": additive, "fractions": torch.tensor([[1, 1, 0.5, 1], [1, 1, 1, 0.0]])}


@pytest.mark.parametrize("mask", masks())
def test_other_masks(mask):
    theirs, ours = pair(22, token_dropout=False)
    ids = torch.tensor([[0, 5, 6, 2], [0, 7, 8, 2]])
    mask = masks()[mask]
    with torch.no_grad(), pytest.warns(NotPackedWarning, match="attention_mask of"):
        if mask.ndim == 4:  # transformers' embeddings, too, take only a mask of two dimensions
            embeds = theirs.esm.embeddings(ids)
            mine, reference = (model(inputs_embeds=embeds, attention_mask=mask).logits for model in (ours, theirs))
        else:
            mine, reference = (model(ids, attention_mask=mask).logits for model in (ours, theirs))
    valid = mask[:, 0, 0].bool() if mask.ndim == 4 else mask.bool()
    torch.testing.assert_close(mine[valid], reference[valid], rtol=0, atol=1e-4)


def test_other_positions_run_on_transformers_code():
    theirs, ours = pair(23, position_embedding_type="relative_key", emb_layer_norm_before=False)
    batch = tokenized()
    with torch.no_grad(), pytest.warns(NotPackedWarning, match="positions are relative_key"):
        mine = ours(**batch, output_hidden_states=True)
    reference, valid = theirs(**batch, output_hidden_states=True), batch.attention_mask.bool()
    torch.testing.assert_close(mine.logits[valid], reference.logits[valid], rtol=0, atol=1e-4)
    assert len(mine.hidden_states) == 3
    with pytest.raises(NotPackable, match="attn_implementation='eager'.*relative_key"):
        ours.predict_contacts(**{"tokens": batch.input_ids})
    ours.set_attn_implementation("eager")
    with pytest.warns(NotPackedWarning, match="relative_key"):
        contacts = ours.predict_contacts(batch.input_ids[:2], batch.attention_mask[:2])
    expected = theirs.predict_contacts(batch.input_ids[:2], batch.attention_mask[:2])
    torch.testing.assert_close(contacts, expected, rtol=0, atol=1e-5)


def test_packed_false_is_transformers():
    theirs, ours = pair(24)
    batch = tokenized()
    ours.set_attn_implementation("eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ours(**batch, packed=False).logits, theirs(**batch).logits)


# --- the weights are the host's own -----------------------------------------------------------------------------------


def other_weights(model):
    return {key: tensor + 0.1 for key, tensor in model.state_dict().items()}


def assign_state(model):
    model.load_state_dict(other_weights(model), assign=True)
    model.tie_weights()


def copy_state(model):
    model.load_state_dict(other_weights(model))


def new_parameter(model):
    query = model.esm.encoder.layer[0].attention.self.query
    query.weight = torch.nn.Parameter(query.weight.detach() + 0.3)


def new_linear(model):
    new = torch.nn.Linear(32, 32)
    with torch.no_grad():
        new.weight.fill_(0.02)
        new.bias.fill_(0.1)
    model.esm.encoder.layer[1].attention.output.dense = new


def fewer_layers(model):
    model.esm.encoder.layer = model.esm.encoder.layer[:1]
    model.config.num_hidden_layers = 1


def double(model):
    model.double()


@pytest.mark.parametrize(
    "change", [assign_state, copy_state, new_parameter, new_linear, fewer_layers, double], ids=lambda c: c.__name__
)
def test_changed_weights_are_seen(change):
    theirs, ours = pair(25)
    batch = tokenized()
    valid = batch.attention_mask.bool()
    with torch.no_grad():
        before = packed(ours, **batch).logits[valid]
        for model in (theirs, ours):
            change(model)
        reference, mine = theirs(**batch).logits[valid], packed(ours, **batch).logits[valid]
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)
    assert change is double or (reference - before).abs().max() > 1e-2


def test_nothing_is_added_to_the_model():
    theirs, ours = pair(26)
    packed(ours, **tokenized())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert torch.equal(packed(twin, **tokenized()).logits, packed(ours, **tokenized()).logits)
    with torch.no_grad():
        twin.lm_head.bias += 1
    assert not torch.equal(packed(twin, **tokenized()).logits, packed(ours, **tokenized()).logits)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["esm.", ""], ids=["prefix", "bare"])
@pytest.mark.parametrize("kind", ["EsmForMaskedLM", "EsmModel"])
def test_folders(tmp_path, safe, prefix, kind):
    theirs = make(30)
    saved = theirs if prefix else theirs.esm
    saved.save_pretrained(tmp_path)
    if not safe:
        (tmp_path / "model.safetensors").unlink()
        torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    batch = tokenized()
    ours = getattr(hf, kind).from_pretrained(tmp_path, output_hidden_states=True)
    assert not ours.training
    with torch.no_grad():
        mine, reference = packed(ours, **batch), theirs(**batch, output_hidden_states=True)
    valid = batch.attention_mask.bool()
    torch.testing.assert_close(mine.hidden_states[-1][valid], reference.hidden_states[-1][valid], rtol=0, atol=1e-4)
    if prefix and kind == "EsmForMaskedLM":
        torch.testing.assert_close(mine.logits[valid], reference.logits[valid], rtol=0, atol=1e-4)


def test_saved_models_are_transformers_models(tmp_path):
    ours = ours_from(make(31))
    ours.save_pretrained(tmp_path)
    hf.EsmTokenizer().save_pretrained(tmp_path)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(theirs) is transformers.EsmForMaskedLM
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(SEQUENCES, return_tensors="pt", padding=True)
    again = esm_fast.EsmForMaskedLM.from_pretrained(tmp_path)
    valid = batch.attention_mask.bool()
    with torch.no_grad():
        mine = packed(ours, **batch).logits
        torch.testing.assert_close(mine[valid], theirs(**batch).logits[valid], rtol=0, atol=1e-4)
        assert torch.equal(packed(again, **batch).logits, mine)


@pytest.fixture
def canonical(tmp_path):
    """A random model of transformers, and the same as esm_fast's own file and as fair-esm's."""
    theirs = make(32)
    with torch.no_grad():
        theirs.esm.embeddings.word_embeddings.weight[MASK] = 0  # as fair-esm's loader does
        theirs.esm.embeddings.word_embeddings.weight[PAD] = 0
    theirs.save_pretrained(tmp_path / "hf")
    own = weights.build(weights.read(tmp_path / "hf"))
    weights.save(own, tmp_path / "own.safetensors")
    return theirs, own, tmp_path


@pytest.mark.parametrize("kind", ["EsmForMaskedLM", "EsmModel"])
@pytest.mark.parametrize("layout", ["own", "fair-esm"])
def test_single_files(canonical, layout, kind):
    theirs, own, folder = canonical
    path = folder / "own.safetensors"
    if layout == "fair-esm":
        path = save_fair_esm(own, folder / "model.pt")
    batch = tokenized()
    ours = getattr(hf, kind).from_pretrained(path)
    assert not ours.training and ours.config.name_or_path == str(path)
    with torch.no_grad():
        mine, reference = packed(ours, **batch, **ASK), theirs(**batch, **ASK)
        valid = batch.attention_mask.bool()
        torch.testing.assert_close(mine.hidden_states[-1][valid], reference.hidden_states[-1][valid], rtol=0, atol=1e-4)
        contacts = theirs.predict_contacts(batch.input_ids[:1], batch.attention_mask[:1])
        given = ours.predict_contacts(batch.input_ids[:1])
        torch.testing.assert_close(given, contacts, rtol=0, atol=1e-5)
    if kind == "EsmForMaskedLM":
        torch.testing.assert_close(mine.logits[valid], reference.logits[valid], rtol=0, atol=1e-4)
        assert ours.lm_head.decoder.weight is ours.esm.embeddings.word_embeddings.weight


def save_fair_esm(own, path, regression=True, head=True):
    """fair-esm's layout, written without fair-esm."""
    from argparse import Namespace

    config = own.config
    arguments = dict(arch="roberta_large", layers=config.layers, embed_dim=config.embed_dim, token_dropout=True)
    arguments |= dict(ffn_embed_dim=config.ffn_embed_dim, attention_heads=config.attention_heads)
    state = own.state_dict()
    side = {key: state.pop(key) for key in list(state) if key.startswith("contact_head.")}
    model = {("encoder." if k.startswith("lm_head") else "encoder.sentence_encoder.") + k: v for k, v in state.items()}
    if not head:
        model = {key: tensor for key, tensor in model.items() if "lm_head" not in key}
    torch.save({"args": Namespace(**arguments, max_positions=config.max_positions), "model": model}, path)
    if regression:
        torch.save({"model": side}, path.with_name(f"{path.stem}-contact-regression.pt"))
    return path


def test_files_without_head_or_regression(canonical):
    _, own, folder = canonical
    path = save_fair_esm(own, folder / "bare.pt", regression=False, head=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(weights.CheckpointError, match="load it with EsmModel"):
            hf.EsmForMaskedLM.from_pretrained(path)
        ours = hf.EsmModel.from_pretrained(path)
    assert any("no contact regression" in str(warning.message) for warning in told)
    with pytest.raises(ValueError, match="no contact regression"):
        ours.predict_contacts(torch.tensor([[0, 5, 6, 2]]))


def test_options_reach_configuration_and_model(canonical):
    path = canonical[2] / "own.safetensors"
    ours = hf.EsmModel.from_pretrained(path, output_hidden_states=True, dtype=torch.bfloat16, add_pooling_layer=False)
    output = packed(ours, torch.tensor([[0, 5, 6, 2]]))
    assert len(output.hidden_states) == 3 and output.pooler_output is None
    assert output.last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["facebook/esm-1b", "facebook/esm1b_t33_650M_UR50S", "esm1b_t33_650M_UR50S"])
@pytest.mark.parametrize("cache", ["torch", "huggingface"])
def test_published_names_come_from_the_caches(canonical, monkeypatch, name, cache):
    theirs, own, folder = canonical
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setenv("HF_HOME", str(folder / "huggingface"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    if cache == "torch":
        (folder / "torch/hub/checkpoints").mkdir(parents=True)
        save_fair_esm(own, folder / "torch/hub/checkpoints/esm1b_t33_650M_UR50S.pt")
    else:
        shutil.copytree(folder / "hf", folder / "huggingface/hub/models--facebook--esm1b_t33_650M_UR50S/snapshots/0")
    ours = esm_fast.ESMForMaskedLM.from_pretrained(name)
    batch = tokenized()
    valid = batch.attention_mask.bool()
    with torch.no_grad():
        mine, reference = packed(ours, **batch).logits[valid], theirs(**batch).logits[valid]
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.makedirs, (str(self.path), 0o777, True)


@pytest.mark.parametrize("container", ["folder", "file"])
def test_nothing_is_executed(tmp_path, container):
    state = make(33).state_dict() | {"canary": Canary(tmp_path / "executed")}
    if container == "folder":
        make(33).config.save_pretrained(tmp_path)
        target = tmp_path
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        target = tmp_path / "esm1b.pt"
        torch.save({"args": Canary(tmp_path / "executed"), "model": state}, target)
    with pytest.raises((ValueError, pickle.UnpicklingError), match="would run code|[Ww]eights.only"):
        hf.EsmForMaskedLM.from_pretrained(target)
    assert not (tmp_path / "executed").exists()
    torch.load(target if container == "file" else target / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "executed").exists()  # the canary does sing


# --- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizers(tmp_path):
    """transformers' own, from a file, and ours, from nothing."""
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS))
    return transformers.EsmTokenizer(str(tmp_path / "vocab.txt")), hf.EsmTokenizer()


def test_tokenizer_tables():
    tokenizer = hf.EsmTokenizer()
    assert tokenizer.tokenize("LAGVS") == ["L", "A", "G", "V", "S"]
    assert tokenizer.encode("LAGVS") == [0, 4, 5, 6, 7, 8, 2]
    assert tokenizer.encode("MKTV", add_special_tokens=False) == [20, 15, 11, 7]
    assert tokenizer(["LAGVS", "WCB"])["input_ids"] == [[0, 4, 5, 6, 7, 8, 2], [0, 22, 23, 25, 2]]
    padded = tokenizer(["LAGVS", "WCB"], padding=True)
    assert padded["input_ids"] == [[0, 4, 5, 6, 7, 8, 2], [0, 22, 23, 25, 2, 1, 1]]
    assert padded["attention_mask"] == [[1] * 7, [1] * 5 + [0] * 2]
    assert tokenizer.encode("<mask>M<cls><pad>", add_special_tokens=False) == [32, 20, 0, 1]
    assert (tokenizer.cls_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, PAD, EOS)
    assert (tokenizer.unk_token_id, tokenizer.mask_token_id, len(tokenizer), tokenizer.vocab_size) == (3, MASK, 33, 33)
    assert tokenizer.convert_ids_to_tokens(list(range(33))) == list(TOKENS)
    assert tokenizer.decode([0, 20, 15, 2], skip_special_tokens=True) == "M K"


ODD_TEXTS = ["mkt", "MKJJK", "M K T", "  MKT\n", "M*", "<eos><unk>", "É", "M.-<null_1>L", "MKT<mask", "ACDJ<mask>*"]
TEXTS = [*SEQUENCES, CARD, *ODD_TEXTS]


OPTIONS = [{}, {"padding": True}, {"truncation": True, "max_length": 5}, {"text_pair": TEXTS}]


@pytest.mark.parametrize("options", OPTIONS)
def test_tokenizer_equals_transformers(tokenizers, options):
    theirs, ours = tokenizers
    assert dict(ours(TEXTS, **options)) == dict(theirs(TEXTS, **options))
    assert [ours.tokenize(text) for text in TEXTS] == [theirs.tokenize(text) for text in TEXTS]


def test_tokenizer_takes_new_tokens(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer.add_tokens(["<sep>"]) == 1
        assert tokenizer.encode("M<sep>K") == [0, 20, 33, 15, 2]


def test_tokenizer_from_names_files_and_folders(tmp_path, tokenizers, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs, ours = tokenizers
    for name in ("facebook/esm-1b", "facebook/esm1b_t33_650M_UR50S", "esm1v_t33_650M_UR90S_3"):
        named = hf.ESMTokenizer.from_pretrained(name, do_lower_case=False, local_files_only=True)
        assert named(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
        assert named.name_or_path == name
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty").mkdir()
    ours.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "model.pt", tmp_path / "empty", tmp_path / "saved", tmp_path / "vocab.txt"):
        assert hf.EsmTokenizer.from_pretrained(path)(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    assert transformers.EsmTokenizer.from_pretrained(tmp_path / "saved").encode(CARD) == theirs.encode(CARD)
    assert pickle.loads(pickle.dumps(ours)).encode(CARD) == theirs.encode(CARD)


# --- the model card ---------------------------------------------------------------------------------------------------

SNIPPETS = """
from transformers import pipeline
from esm_fast import ESMForMaskedLM, ESMTokenizer
tokenizer = ESMTokenizer.from_pretrained("facebook/esm-1b", do_lower_case=False)
model = ESMForMaskedLM.from_pretrained("facebook/esm-1b")
unmasker = pipeline('fill-mask', model=model, tokenizer=tokenizer)
answers = unmasker('QERLKSIVRILE<mask>SLGYNIVAT')

sequence_Example = "QERLKSIVRILE"
encoded_input = tokenizer(sequence_Example, return_tensors='pt')
output = model(**encoded_input)
"""


def run_card() -> dict:
    names: dict = {}
    exec(SNIPPETS, names)
    return names


def test_model_card_snippets(canonical, monkeypatch):
    theirs, own, folder = canonical
    monkeypatch.setenv("TORCH_HOME", str(folder))
    (folder / "hub/checkpoints").mkdir(parents=True)
    save_fair_esm(own, folder / "hub/checkpoints/esm1b_t33_650M_UR50S.pt")
    names = run_card()
    assert names["output"].logits.shape == (1, 14, 33)
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
    plain = transformers.pipeline("fill-mask", model=theirs, tokenizer=transformers.EsmTokenizer(folder / "vocab.txt"))
    expected = plain(CARD)
    assert len(names["answers"]) == len(expected) == 5
    for mine, reference in zip(names["answers"], expected, strict=True):
        assert mine.keys() == {"sequence", "score", "token", "token_str"}
        assert mine["score"] == pytest.approx(reference["score"], abs=1e-5)
        assert (mine["token"], mine["token_str"]) == (reference["token"], TOKENS[mine["token"]])
        special = mine["token"] in (0, 1, 2, 3, MASK)
        residue = [] if special else [mine["token_str"]]
        assert mine["sequence"] == " ".join([*"QERLKSIVRILE", *residue, *"SLGYNIVAT"]) == reference["sequence"]


def test_the_card_runs_from_the_root_of_the_repository(canonical):
    """Where the folder `kernels` answers to the name of a package that transformers looks for."""
    _, own, folder = canonical
    (folder / "hub/checkpoints").mkdir(parents=True)
    save_fair_esm(own, folder / "hub/checkpoints/esm1b_t33_650M_UR50S.pt")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-c", SNIPPETS + "print(len(answers))"]
    environment = os.environ | {"TORCH_HOME": str(folder)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5"


GOLDEN = {"E": 0.0933581069, "K": 0.0919843167, "S": 0.0677577108, "L": 0.0661069006, "R": 0.0633091554}


@pytest.mark.weights
def test_golden_scores_of_the_model_card():
    """The five scores that the model card prints for the published weights."""
    if hub.cached("esm1b_t33_650M_UR50S") is None:
        pytest.skip("esm1b_t33_650M_UR50S is neither in torch-hub's nor in Hugging Face's cache")
    answers = run_card()["answers"]
    assert [answer["token_str"] for answer in answers] == list(GOLDEN)
    for answer in answers:
        assert answer["score"] == pytest.approx(GOLDEN[answer["token_str"]], abs=1e-4)
        assert answer["sequence"] == " ".join(CARD.replace("<mask>", answer["token_str"]))


def test_without_transformers_the_error_names_the_extra():
    code = "import sys; sys.modules['transformers'] = None; import esm_fast; esm_fast.load; esm_fast.ESMForMaskedLM"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ESMForMaskedLM needs transformers: pip install 'esm_fast[hf]'" in done.stderr
