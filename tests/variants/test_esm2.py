"""ESM-2, whose positions are rotary and whose proteins have no limit: the same formulas, over fair-esm's ESM2."""

from argparse import Namespace

import numpy as np
import pytest
import torch
import variant_formulas as formulas
from fakes import trained_like

import esm_fast
from esm_fast import variants

CLOSE = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(fair-esm's ESM-2, ours), the same random weights."""
    esm = pytest.importorskip("esm", reason="fair-esm is not installed")
    fair = trained_like(esm.ESM2(num_layers=2, embed_dim=32, attention_heads=4, alphabet="ESM-1b"), seed=3)
    state = {
        ("encoder." if key.startswith("lm_head.") else "encoder.sentence_encoder.") + key: tensor
        for key, tensor in fair.state_dict().items()
        if not key.startswith("contact_head")
    }
    sizes = Namespace(encoder_layers=2, encoder_embed_dim=32, encoder_attention_heads=4, token_dropout=True)
    path = tmp_path_factory.mktemp("esm2") / "tiny.pt"
    torch.save({"cfg": {"model": sizes}, "model": state}, path)
    return fair, esm_fast.load(path)[0]


@pytest.mark.parametrize("strategy", ["wt", "masked", "masked-joint", "mutant"])
def test_strategies(pair, strategy):
    fair, ours = pair
    text = "MKTAYIAKQRQISFVKSHFSRQ"
    expected = getattr(formulas, strategy.replace("-", "_"))(fair, text, [("K", 2, "W"), ("F", 14, "A")])
    np.testing.assert_allclose(variants.score(ours, text, ["K2W:F14A"], strategy=strategy), [expected], **CLOSE)


def test_long_proteins_in_published_windows_or_whole(pair, protein):
    fair, ours = pair
    text = protein(1100, seed=2)
    mutation = (text[699], 700, "W" if text[699] != "W" else "A")
    name = "".join(map(str, mutation))
    expected = formulas.masked_optimal(fair, text, mutation)
    np.testing.assert_allclose(variants.score(ours, text, [name], strategy="masked"), [expected], **CLOSE)
    np.testing.assert_allclose(variants.log_probs(ours, text), formulas.brandes_rows(fair, text), **CLOSE)
    whole = formulas.wt(fair, text, [mutation])
    np.testing.assert_allclose(variants.score(ours, text, [name], window="whole"), [whole], **CLOSE)
    likelihoods = [formulas.likelihood(fair, t) for t in (text[:9] + text[10:], text)]
    found = variants.score(ours, text, [f"{text[9]}10del"], strategy="pllr", window="whole")
    np.testing.assert_allclose(found, [likelihoods[0] - likelihoods[1]], atol=1e-3)
