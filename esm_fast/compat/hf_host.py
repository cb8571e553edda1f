"""How transformers builds its ESM, and how the arguments of its forward are packed; see `hf`."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.models.esm import modeling_esm as theirs

from .. import ops
from ..alphabet import EOS, MASK, PAD, X
from ..models.arguments import refuse_recording, require_tensor
from ..models.attached import require_numbers
from ..models.encoder import Encoder
from ..models.family import Family, families, titles
from ..ops.common import accumulate_dtype
from ..ops.embedding import KEPT_IN_TRAINING
from ..sequences.batching import PackedBatch, pack_padded
from .shared import Layout, NotPackable, Part, check_tokens, same_heads


def _family_of(esm) -> Family:
    # Of the module, whose class `find` has not checked yet, rather than of the configuration, which may be edited.
    positions = getattr(esm._modules.get("embeddings"), "position_embedding_type", None)
    for family in families().values():
        if family.reads_hf({"position_embedding_type": positions}):
            return family
    raise NotPackable(f"its positions are {positions}; esm_fast runs {titles()}")


def _describe(esm, top, layers) -> dict:
    embeddings, tokens = top["embeddings"], top["embeddings.word_embeddings"]
    _require_encoder(esm.config)
    require_numbers(embeddings, "embeddings", padding_idx=PAD)
    if embeddings._modules.get("layer_norm") is not None and "embeddings.layer_norm" not in top:
        raise NotPackable("embeddings.layer_norm is there, which models of its family do not have")
    check_tokens(tokens, bool(embeddings.token_dropout), embeddings.mask_token_id)
    if top["contact_head"].eos_idx != EOS:
        raise NotPackable(f"its <eos> token is {top['contact_head'].eos_idx}; in the models esm_fast knows it is {EOS}")
    for number, layer in enumerate(layers):
        attention, path = layer["attention.self"], f"encoder.layer.{number}.attention.self"
        size = tokens.embedding_dim // attention.num_attention_heads
        kind = getattr(embeddings, "position_embedding_type", None)
        require_numbers(attention, path, attention_head_size=size, position_embedding_type=kind)
        require_numbers(attention, path, scaling=1.0, is_causal=False)
    return dict(
        layers=len(layers),
        embed_dim=tokens.embedding_dim,
        ffn_embed_dim=layers[0]["intermediate.dense"].out_features if layers else 0,
        attention_heads=same_heads([layer["attention.self"].num_attention_heads for layer in layers]),
        token_dropout=bool(embeddings.token_dropout),
        layer_norm_eps=getattr(top["encoder.emb_layer_norm_after"], "eps", 1e-5),  # each norm's own comes with it
    )


def _require_encoder(config) -> None:
    for name in ("is_decoder", "add_cross_attention", "is_causal"):
        if getattr(config, name, False):
            raise NotPackable(f"its configuration says {name}; esm_fast runs encoders")


def _dropouts(layer) -> tuple[float, float]:
    attention, after, last = layer["attention.self"], layer["attention.output.dropout"], layer["output.dropout"]
    hidden = [module.p if module.training else 0.0 for module in (after, last)]
    if hidden[0] != hidden[1]:
        raise NotPackable(f"a layer's two dropouts have different probabilities, {hidden[0]} and {hidden[1]}")
    return hidden[0], attention.dropout if attention.training else 0.0


def _recomputes(layers) -> bool:
    return any(layer[""].training and layer[""].gradient_checkpointing for layer in layers)


LAYOUT = Layout(
    package="transformers",
    top=(
        Part("embeddings", theirs.EsmEmbeddings),
        Part("embeddings.word_embeddings", nn.Embedding, "embed_tokens"),
        Part("encoder", theirs.EsmEncoder),
        Part("encoder.layer", nn.ModuleList),
        Part("encoder.emb_layer_norm_after", nn.LayerNorm, "emb_layer_norm_after"),
        Part("contact_head", theirs.EsmContactPredictionHead),
        Part("contact_head.activation", nn.Sigmoid),
        Part("contact_head.regression", nn.Linear, "contact_head.regression"),
    ),
    layers="encoder.layer",
    per_layer=(
        Part("", theirs.EsmLayer),
        Part("attention", theirs.EsmAttention),
        Part("attention.LayerNorm", nn.LayerNorm, "self_attn_layer_norm"),
        Part("attention.self", theirs.EsmSelfAttention),
        Part("attention.self.query", nn.Linear, "self_attn.q_proj"),
        Part("attention.self.key", nn.Linear, "self_attn.k_proj"),
        Part("attention.self.value", nn.Linear, "self_attn.v_proj"),
        Part("attention.output", theirs.EsmSelfOutput),
        Part("attention.output.dense", nn.Linear, "self_attn.out_proj"),
        Part("attention.output.dropout", nn.Dropout),
        Part("LayerNorm", nn.LayerNorm, "final_layer_norm"),
        Part("intermediate", theirs.EsmIntermediate),
        Part("intermediate.dense", nn.Linear, "fc1"),
        Part("output", theirs.EsmOutput),
        Part("output.dense", nn.Linear, "fc2"),
        Part("output.dropout", nn.Dropout),
    ),
    family_of=_family_of,
    describe=_describe,
    dropouts=_dropouts,
    recomputes=_recomputes,
)
HEAD = (
    Part("lm_head", theirs.EsmLMHead),
    Part("lm_head.dense", nn.Linear),
    Part("lm_head.layer_norm", nn.LayerNorm),
    Part("lm_head.decoder", nn.Linear),
)


def check_inputs(input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None) -> None:
    """Raises TypeError or ValueError, naming what no model takes; RuntimeError where torch records the call."""
    refuse_recording()
    for name, ids in (("input_ids", input_ids), ("position_ids", position_ids)):
        require_tensor(name, ids, integers=True, optional=True)
    given = (("attention_mask", attention_mask), ("inputs_embeds", inputs_embeds), ("labels", labels))
    for name, value in given:
        require_tensor(name, value, optional=True)
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if tokens is None:
        raise ValueError("give either input_ids or inputs_embeds")
    if tokens.ndim != (2 if inputs_embeds is None else 3):
        raise ValueError(
            f"input_ids are (batch, length), inputs_embeds (batch, length, width); got {tuple(tokens.shape)}"
        )
    count = tokens.shape[0] * tokens.shape[1]
    if labels is not None and labels.numel() != count:
        raise ValueError(f"labels are one a token, {tuple(tokens.shape[:2])}; got {tuple(labels.shape)}")


@dataclass
class PackedInput:
    """The arguments of a call, packed."""

    batch: PackedBatch
    rows: torch.Tensor  # where the packed tokens stood in the flattened (B, T)
    shape: tuple[int, int]
    scale: torch.Tensor | None  # token-dropout factors as transformers counts them
    embedded: torch.Tensor | None


def pack_input(model: Encoder, input_ids, attention_mask, position_ids, inputs_embeds) -> PackedInput:
    """Packs what attention_mask keeps: everything without a mask, padding included, as transformers does."""
    wide = accumulate_dtype(model.dtype)
    tokens = _tokens(input_ids, inputs_embeds).to(model.device)
    keep = _keep(attention_mask, tokens)
    batch, rows = pack_padded(tokens, keep)
    shape = tuple(tokens.shape)
    positions, columns = batch.positions, rows.int() % max(shape[1], 1)
    if position_ids is not None:
        positions = columns = position_ids.to(model.device).expand(shape).flatten()[rows].int()
    batch = replace(batch, positions=model.positions(positions, columns))
    if inputs_embeds is not None:
        embedded = ops.pack_rows(inputs_embeds.to(model.device, wide).flatten(0, 1), rows, backend=model.backend)
        return PackedInput(batch, rows, shape, None, embedded)
    _check_range("input_ids", batch.tokens, model.embed_tokens.weight.shape[0])
    if model.position_rows is not None:
        _check_range("positions", batch.positions, model.position_rows)
    # transformers counts the <mask> tokens of the whole row, also those that attention_mask leaves out.
    masked = (tokens == MASK).sum(1).float() / keep.sum(1)
    return PackedInput(batch, rows, shape, KEPT_IN_TRAINING / (1 - masked).to(wide), None)


def _tokens(input_ids, inputs_embeds) -> torch.Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    if inputs_embeds is not None:
        return inputs_embeds.new_full(inputs_embeds.shape[:2], X, dtype=torch.long)  # their ids do not matter
    return input_ids


def _keep(attention_mask, tokens: torch.Tensor) -> torch.Tensor:
    if attention_mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != tokens.shape:
        raise NotPackable(f"only an attention_mask of shape (batch, length), {tuple(tokens.shape)}, can be packed")
    attention_mask = attention_mask.to(tokens.device)
    keep = attention_mask != 0
    if not bool((keep == attention_mask).all()):
        raise NotPackable("only an attention_mask of zeros and ones can be packed")
    return keep


def _check_range(name: str, values: torch.Tensor, end: int) -> None:
    """On a GPU a bad index would only show as a device assertion."""
    if values.numel():
        low, high = (int(bound) for bound in values.aminmax())
        if low < 0 or high >= end:
            raise ValueError(f"{name} must be 0 to {end - 1}, got {low} to {high}")
