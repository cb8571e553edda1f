"""Models shared by the tests: fair-esm's own, random, in the file layouts users have."""

import argparse
from pathlib import Path

import pytest
import torch

SEQUENCES = [
    ("ragged", "MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDIAYLRSLGYNIVATPRGYVLAGG"),
    ("masked", "KALTARQQEVFDLIRD<mask>ISQTGMPPTRAEIAQRLGF<mask>SPNAAEEHLKALARKG"),
    ("one", "M"),
    ("empty", ""),
    ("rare", "ACDEFGHIKLMNPQRSTVWYXBUZO.-"),
]


def trained_like(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights that behave as trained ones: layer-norm gains spread log-normally, attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                spread = 0.5 if "regression" in name else 1.2 * parameter.shape[1] ** -0.5
                parameter.normal_(std=spread, generator=generator)
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.normal_(std=0.5, generator=generator).exp_()
            else:
                parameter.normal_(std=0.1, generator=generator)
        # The rows nn.Embedding keeps at zero for padding.
        for table in ("embed_tokens", "embed_positions"):
            if isinstance(getattr(model, table, None), torch.nn.Embedding):
                getattr(model, table).weight[1] = 0
    return model.eval()


def fair_esm_model(seed=0, *, layers=3, heads=4, head_dim=8, ffn=48, norm_before=True, token_dropout=True):
    """A random `esm.ProteinBertModel` of the ESM-1b (norm_before) or ESM-1v architecture."""
    esm = pytest.importorskip("esm", reason="fair-esm is not installed")
    args = argparse.Namespace(
        arch="roberta_large",
        layers=layers,
        embed_dim=heads * head_dim,
        ffn_embed_dim=ffn,
        attention_heads=heads,
        max_positions=1024,
        token_dropout=token_dropout,
        emb_layer_norm_before=norm_before,
    )
    model = trained_like(esm.ProteinBertModel(args, esm.Alphabet.from_architecture("ESM-1b")), seed)
    with torch.no_grad():
        model.embed_tokens.weight[32] = 0  # fair-esm's loader zeroes <mask>
    return model


def hf_model(kind="EsmForMaskedLM", **changes):
    """A random model of transformers, two layers of 4 heads x 8."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
    sizes |= dict(pad_token_id=1, mask_token_id=32, layer_norm_eps=1e-5, emb_layer_norm_before=True)
    sizes |= dict(token_dropout=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = transformers.EsmConfig(**(sizes | changes), attn_implementation="eager")
    return trained_like(getattr(transformers, kind)(config), 3)


def save_fair_esm(model, path: Path, *, regression=True) -> Path:
    """Writes a model as fair-esm publishes it: arguments and keys with their training prefixes, regression apart."""
    arguments = {"arch": "roberta_large", "max_positions": 1024, "token_dropout": model.args.token_dropout}
    for name in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads"):
        arguments[f"encoder_{name}"] = getattr(model.args, name)
    state, side = {}, {}
    for key, tensor in model.state_dict().items():
        if key.startswith("contact_head."):
            side[key] = tensor
        else:
            state[("encoder." if key.startswith("lm_head.") else "encoder.sentence_encoder.") + key] = tensor
    torch.save({"args": argparse.Namespace(**arguments), "model": state}, path)
    if regression:
        torch.save({"model": side}, path.with_name(path.stem + "-contact-regression.pt"))
    return path
