"""fair-esm's own ProteinBertModel (ESM-1b, ESM-1v) computing packed; see `accelerate`. Needs the package fair-esm."""

from esm import modules as theirs
from esm.model import esm1
from esm.multihead_attention import MultiheadAttention
from torch import nn

from ..alphabet import EOS
from ..models.esm1 import Config
from .shared import Layout, NotPackable, PackedEncoder, Part, check_embeddings, same_heads, warn_not_packed


def _same(path: str, kind: type[nn.Module], **options) -> Part:
    """A part whose parameters have fair-esm's names in both models."""
    return Part(path, kind, path, **options)


def _describe(host, top, layers) -> Config:
    tokens, positions = top["embed_tokens"], top["embed_positions"]
    token_dropout = bool(getattr(host.args, "token_dropout", False))
    check_embeddings(tokens, positions, token_dropout, host.mask_idx)
    contacts = top["contact_head"]
    if not (contacts.prepend_bos and contacts.append_eos and contacts.eos_idx == EOS):
        raise NotPackable("its alphabet has no <cls> or no <eos>")
    return Config(
        layers=len(layers),
        embed_dim=tokens.embedding_dim,
        ffn_embed_dim=layers[0]["fc1"].out_features,
        attention_heads=same_heads([layer["self_attn"].num_heads for layer in layers]),
        max_positions=positions.max_positions,
        token_dropout=token_dropout,
        emb_layer_norm_before="emb_layer_norm_before" in top,
        layer_norm_eps=(top.get("emb_layer_norm_before") or top["emb_layer_norm_after"]).eps,
    )


_NORM = theirs.ESM1bLayerNorm  # apex's where apex is installed, else torch's
LAYOUT = Layout(
    top=(
        _same("embed_tokens", nn.Embedding),
        _same("embed_positions", theirs.LearnedPositionalEmbedding),
        _same("emb_layer_norm_before", _NORM, optional=True),
        _same("emb_layer_norm_after", _NORM),
        _same("lm_head", theirs.RobertaLMHead),
        _same("lm_head.dense", nn.Linear),
        _same("lm_head.layer_norm", _NORM),
        Part("contact_head", theirs.ContactPredictionHead),
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
    describe=_describe,
)


class ProteinBertModel(PackedEncoder, esm1.ProteinBertModel):
    """fair-esm's class with another forward: same parameters, same arguments, same dictionary.

    Rows of padding hold 0, where fair-esm leaves what it computed for them.
    """

    esm_fast_layout = LAYOUT

    def forward(self, tokens, repr_layers=(), need_head_weights=False, return_contacts=False):
        try:
            model = self.esm_fast_shadow()
        except NotPackable as reason:
            warn_not_packed(reason)
            return super().forward(tokens, repr_layers, need_head_weights, return_contacts)
        return model(tokens, repr_layers, need_head_weights, return_contacts)
