"""Outputs of a run: found by file, needed once, joined from windows; pooled in the pass; logits at chosen rows."""

import random
import sys
import types

import numpy as np
import pytest
import torch
from fakes import trained_like
from hypothesis import given, settings
from hypothesis import strategies as st

import esm_fast
from esm_fast import ops
from esm_fast.inference import outputs
from esm_fast.inference.outputs import make
from esm_fast.inference.outputs.logits import Logits, masks_of
from esm_fast.inference.stream import run
from esm_fast.models.esm1 import Config
from esm_fast.sequences.fasta import records_from
from esm_fast.sequences.tokenize import Policy, Report, tokenize

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
LONGEST = 20


@pytest.fixture(scope="module")
def model():
    """Takes 20 residues at most, so that windows are cheap to test."""
    return trained_like(esm_fast.ProteinBertModel(Config(3, 32, 64, 2, max_positions=LONGEST + 2)), 0)


def protein(length, seed=0):
    return "".join(random.Random(seed).choices(RESIDUES, k=length))


def tokens_of(sequences):
    return [tokenize(records, Policy(overlength="window"), Report()) for records in records_from(sequences)]


def stream(model, sequences, asked, budget=64):
    return [found.arrays for found in run(model, tokens_of(sequences), asked, budget)]


def windows(length):
    starts = [0] if length <= LONGEST else [*range(0, length - LONGEST, LONGEST // 2), length - LONGEST]
    return [(at, min(at + LONGEST, length)) for at in starts]


def through_the_model(model, sequence):
    _, _, tokens = model.alphabet.get_batch_converter()([("x", sequence)])
    with torch.no_grad():
        found = model(tokens, repr_layers=range(4))
    return {n: x[0, 1:-1].double().numpy() for n, x in found["representations"].items()}, found["logits"][0, 1:-1]


@pytest.mark.parametrize("length", [1, 19, 20, 21, 30, 31, 73])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_windows_join_exactly(model, length, layer):
    """Each residue counts once: where windows overlap, each of them for its share."""
    sequence = protein(length, seed=length)
    parts = [through_the_model(model, sequence[a:b])[0][layer] for a, b in windows(length)]
    covered = np.zeros(length)
    for a, b in windows(length):
        covered[a:b] += 1
    rows, weights = np.concatenate(parts), np.concatenate([1 / covered[a:b] for a, b in windows(length)])
    mean = np.average(rows, axis=0, weights=weights)
    wanted = {"mean": mean, "max": rows.max(0), "std": np.average((rows - mean) ** 2, axis=0, weights=weights) ** 0.5}
    ((*found,),) = stream(model, [("x", sequence)], [make(name, layer) for name in wanted])
    for name, array in zip(wanted, found, strict=True):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=2e-5, err_msg=name)


def test_std_of_equal_residues_far_from_zero_is_small():
    """What a difference of squares would lose."""
    rows = torch.full((400, 8), 1e4) + torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) * 1e-2
    offsets = torch.tensor([0, 400], dtype=torch.int32)
    for backend in ("reference", "cpu"):
        _, variance = ops.pool_moments(rows, offsets, torch.ones(400), backend=backend)[0]
        np.testing.assert_allclose(variance.sqrt(), rows.double().std(0, correction=0), rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 45), min_size=1, max_size=9),
    budgets=st.lists(st.integers(1, 200), min_size=2, max_size=2),
    asked=st.lists(st.sampled_from(["mean", "cls", "max", "std", "per_residue", "logits"]), min_size=1, max_size=4),
    layer=st.integers(0, 3),
)
def test_neighbours_batches_and_other_outputs_change_no_bit(model, lengths, budgets, asked, layer):
    sequences = [(f"p{i}", protein(length, seed=i)) for i, length in enumerate(lengths)]
    chosen = [make(name, layer) for name in asked]
    together = stream(model, sequences, chosen, budgets[0])
    for i, sequence in enumerate(sequences):
        for number, output in enumerate(chosen):
            ((alone,),) = stream(model, [sequence], [output], budgets[1])
            np.testing.assert_array_equal(alone, together[i][number])


def test_all_layers_at_once_are_each_layers_own(model):
    sequences = [("a", protein(20)), ("b", protein(45, seed=2))]
    for name in ("mean", "max", "std", "per_residue"):
        together = stream(model, sequences, [make(name, layer) for layer in range(4)])
        for layer in range(4):
            alone = stream(model, sequences, [make(name, layer)])
            for (one,), all_layers in zip(alone, together, strict=True):
                np.testing.assert_array_equal(one, all_layers[layer])


def test_logits_are_the_models_at_residues_and_at_masks(model):
    plain, masked = protein(18), "AC<mask>DE<mask><mask>K"
    ((got,), (got_masked,)) = stream(model, [plain, masked], [make("logits")])
    np.testing.assert_allclose(got, through_the_model(model, plain)[1], rtol=0, atol=3e-5)
    ((_,), (at_masks,)) = stream(model, [plain, masked], [Logits(only=masks_of)])
    assert at_masks.shape == (3, 33)
    np.testing.assert_array_equal(at_masks, got_masked[[2, 5, 6]])


def test_what_is_attached_to_the_head_is_not_passed_over(model):
    """Logits are made by the head as it is, not by its parameters alone."""
    ((before,),) = stream(model, ["ACDEF"], [make("logits")])
    handle = model.lm_head.register_forward_hook(lambda head, given, logits: logits + 1)
    try:
        ((after,),) = stream(model, ["ACDEF"], [make("logits")])
    finally:
        handle.remove()
    np.testing.assert_allclose(after, before + 1, rtol=0, atol=3e-5)


def test_rows_wanted_of_the_last_layer_change_no_bit(model):
    """Whether the last layer runs on them alone, or on all because something else needs it."""
    sequences = ["AC<mask>DE", protein(20), protein(33, seed=3).replace("A", "C")]
    alone = stream(model, sequences[:2], [Logits(only=masks_of)], 500)
    beside = stream(model, sequences[:2], [make("mean", 3), Logits(only=masks_of)], 500)
    for (one,), (_, other) in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("asked", [make("contacts"), Logits(only=masks_of)])
def test_what_cannot_be_made_of_windows_says_so(model, asked):
    if asked.name == "contacts":
        trained_like(model, 0).contact_head.regression.weight.data.fill_(0.1)
    with pytest.raises(ValueError, match=f"'long' has 21 residues: {asked.name} cannot be made of windows"):
        stream(model, [("ok", "ACD"), ("long", protein(21))], [asked])


def test_unknown_outputs_are_refused_by_name():
    with pytest.raises(ValueError, match="no output 'median'; choose one of .*contacts.*logits.*mean"):
        make("median")


def test_a_new_output_is_one_file(model, monkeypatch, tmp_path):
    """Dropped into the package it is found: by `embed` and by `make`; nothing else names it."""
    (tmp_path / "ends.py").write_text(
        "import numpy as np\n"
        "from esm_fast.inference.outputs import Needs, Output\n"
        "class Ends(Output):\n"
        "    name, per = 'ends', 'protein'\n"
        "    def __init__(self, layer): self.layer = layer\n"
        "    def needs(self, batch):\n"
        "        return Needs(layers=(self.layer,))\n"
        "    def reduce(self, given, batch):\n"
        "        rows = given.representations[self.layer].numpy()\n"
        "        return [rows[end - 1] - rows[start] for start, end in batch.bounds]\n"
        "OUTPUTS = {'ends': Ends}\n"
    )
    monkeypatch.setattr(outputs, "__path__", [*outputs.__path__, str(tmp_path)])
    outputs.outputs.cache_clear()
    try:
        assert "ends" in outputs.pools("protein") and "ends" not in outputs.pools("residue")
        ((_, found),) = esm_fast.embed(model, ["ACDEF"], pool="ends", layers=(1, 2))
        assert set(found) == {1, 2} and found[1].shape == (32,)
    finally:
        monkeypatch.undo()
        outputs.outputs.cache_clear()
        sys.modules.pop("esm_fast.inference.outputs.ends", None)
    assert "ends" not in outputs.pools()


def test_pooling_keeps_no_layer(model):
    """What the pass returns of pooled layers is the pooled rows: no copy of the stream."""
    seen = []
    real = model.forward_packed

    def forward(batch, **asked):
        seen.append((asked, found := real(batch, **asked)))
        return found

    spy = types.SimpleNamespace(
        forward_packed=forward, config=model.config, device=model.device, dtype=model.dtype, lm_head=model.lm_head
    )
    stream(spy, ["ACDEF", "ACD"], [make(name, layer) for name in ("mean", "max", "std") for layer in range(4)])
    ((asked, found),) = seen
    assert not asked["layers"] and not found.representations
    assert [tuple(rows.shape) for rows in found.pooled] == [(2, 32)] * 8 + [(2, 2, 32)] * 4
