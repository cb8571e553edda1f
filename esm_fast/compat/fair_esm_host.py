"""fair-esm's own models computing packed; see `accelerate`. Needs the package fair-esm."""

import importlib

from esm import modules as theirs
from esm.multihead_attention import MultiheadAttention
from torch import nn

from ..alphabet import EOS, PAD
from ..models.arguments import refuse_recording
from ..models.attached import require_numbers
from ..models.family import Family, families
from ..models.padded import token_dropout_of
from .shared import Layout, NotPackable, PackedEncoder, Part, check_tokens, same_heads, warn_not_packed


def _same(path: str, kind: type[nn.Module], **options) -> Part:
    """A part whose parameters have fair-esm's names in both models."""
    return Part(path, kind, path, **options)


def _family_of(host) -> Family:
    kinds = [f"{kind.__module__}:{kind.__name__}" for kind in type(host).__mro__]
    return next(family for family in families().values() if family.fair_esm_class in kinds)


def _describe(host, top, layers) -> dict:
    tokens = top["embed_tokens"]
    token_dropout = token_dropout_of(host)
    require_numbers(host, "the model", embed_scale=1, padding_idx=PAD)
    for number, layer in enumerate(layers):
        attention, path = layer["self_attn"], f"layers.{number}.self_attn"
        size = attention.embed_dim // attention.num_heads
        require_numbers(attention, path, head_dim=size, scaling=size**-0.5, add_zero_attn=False)
        require_numbers(attention, path, bias_k=None, bias_v=None, **{"dropout": 0.0} if attention.training else {})
    check_tokens(tokens, token_dropout, host.mask_idx)
    contacts = top["contact_head"]
    if not (contacts.prepend_bos and contacts.append_eos and contacts.eos_idx == EOS):
        raise NotPackable("its alphabet has no <cls> or no <eos>")
    return dict(
        layers=len(layers),
        embed_dim=tokens.embedding_dim,
        ffn_embed_dim=layers[0]["fc1"].out_features,
        attention_heads=same_heads([layer["self_attn"].num_heads for layer in layers]),
        token_dropout=token_dropout,
        layer_norm_eps=getattr(top["emb_layer_norm_after"], "eps", 1e-5),  # each norm's own comes with its weights
    )


_NORM = theirs.ESM1bLayerNorm  # apex's where apex is installed, else torch's
LAYOUT = Layout(
    package="fair-esm",
    top=(
        _same("embed_tokens", nn.Embedding),
        _same("emb_layer_norm_after", _NORM),
        _same("lm_head", theirs.RobertaLMHead),
        _same("lm_head.dense", nn.Linear),
        _same("lm_head.layer_norm", _NORM),
        Part("contact_head", theirs.ContactPredictionHead),
        Part("contact_head.activation", nn.Sigmoid),
        _same("contact_head.regression", nn.Linear),
        Part("layers", nn.ModuleList),
    ),
    layers="layers",
    per_layer=(
        Part("", theirs.TransformerLayer),
        Part("self_attn", MultiheadAttention),
        *(_same(f"self_attn.{name}_proj", nn.Linear) for name in ("q", "k", "v", "out")),
        _same("self_attn_layer_norm", _NORM),
        _same("fc1", nn.Linear),
        _same("fc2", nn.Linear),
        _same("final_layer_norm", _NORM),
    ),
    family_of=_family_of,
    describe=_describe,
)


class _Packed(PackedEncoder):
    """fair-esm's class with another forward: same parameters, same arguments, same dictionary.

    Rows of padding hold 0, where fair-esm leaves what it computed for them.
    """

    esm_fast_layout = LAYOUT

    def forward(self, tokens, repr_layers=(), need_head_weights=False, return_contacts=False):
        refuse_recording()
        try:
            model = self.esm_fast_shadow()
        except NotPackable as reason:
            warn_not_packed(reason)
            return super().forward(tokens, repr_layers, need_head_weights, return_contacts)
        return model(tokens, repr_layers, need_head_weights, return_contacts)


def __getattr__(name: str) -> type[nn.Module]:
    """Our subclass of the class of fair-esm's with this name, made when it is first asked for."""
    for family in families().values():
        module, _, kind = family.fair_esm_class.partition(":")
        if kind == name:
            original = getattr(importlib.import_module(module), name)
            names = {"__doc__": _Packed.__doc__, "__module__": __name__}
            return globals().setdefault(name, type(name, (_Packed, original), names))
    raise AttributeError(f"{__name__} has no {name!r}")
