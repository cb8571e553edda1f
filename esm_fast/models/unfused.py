"""The model computed by calling its modules on padded tokens, in the order and shapes in which fair-esm calls its own:
what a model with hooks or unknown modules in it runs on. Slow, and faithful to what is attached; see `attached`.
"""

from typing import TYPE_CHECKING

import torch

from .. import ops
from ..alphabet import MASK, PAD
from ..ops.common import accumulate_dtype
from ..ops.embedding import KEPT_IN_TRAINING
from ..sequences.batching import PackedBatch
from .results import Outputs

if TYPE_CHECKING:
    from .encoder import Encoder


def forward(
    model: "Encoder", tokens, repr_layers=(), need_head_weights=False, return_contacts=False, *, x=None, scale=None
) -> dict:
    """fair-esm's dictionary for (B, T) tokens. Where they are <pad>, representations and logits are 0.

    x: (B, T, width), what the first layer gets in place of the embedding of the tokens. scale: (B,) token-dropout
    factors in place of the model's own count.
    """
    padding = tokens.eq(PAD)
    if x is None:
        x = _embed(model, tokens, padding, scale)
    wanted, representations, maps = set(repr_layers), {}, []
    if 0 in wanted:
        representations[0] = x
    x, number = x.masked_fill(padding[..., None], 0.0).transpose(0, 1), 0
    mask = padding if bool(padding.any()) else None
    for number, layer in enumerate(model.layers, start=1):
        x, attention = layer(x, self_attn_padding_mask=mask, need_head_weights=need_head_weights or return_contacts)
        if need_head_weights or return_contacts:
            maps.append(attention.transpose(1, 0))
        if number in wanted:
            representations[number] = x.transpose(0, 1)
    x = model.emb_layer_norm_after(x).transpose(0, 1)
    if number in wanted:
        representations[number] = x
    result = {"representations": {k: _cleared(r.to(model.dtype), padding) for k, r in representations.items()}}
    if model.lm_head is not None:
        result["logits"] = _cleared(model.lm_head(x), padding)
    if maps:
        real = ~padding
        pairs = (real[:, :, None] & real[:, None, :])[:, None, None]
        result["attentions"] = torch.stack(maps, 1).masked_fill(~pairs, 0.0)
        if return_contacts:
            result["contacts"] = model.contact_head(tokens, result["attentions"])
    return result


def _cleared(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(padding[..., None], 0.0)


def _embed(model: "Encoder", tokens, padding, scale):
    positions = (~padding).cumsum(1) * ~padding + PAD
    factor = None
    if model.config.token_dropout:
        if scale is None:
            masked = (tokens == MASK).sum(1).float() / (~padding).sum(1)
            scale = KEPT_IN_TRAINING / (1 - masked).to(accumulate_dtype(model.dtype))  # as `token_dropout_scale`
        factor = scale[:, None].expand(tokens.shape)
    return model.embed_by_modules(tokens, positions, factor)


def forward_packed(
    model: "Encoder", batch: PackedBatch, *, layers, pools, rows, logits, attentions, contacts, scale, embedded
) -> Outputs:
    """`Encoder.forward_packed`, through the padded call; of the model itself, where something is attached to that."""
    lengths = batch.lengths.tolist()
    shape = (len(lengths), max(lengths, default=0))
    at = [torch.arange(n) + i * shape[1] for i, n in enumerate(lengths)]
    at = (torch.cat(at) if at else torch.arange(0)).to(batch.tokens.device)
    tokens = batch.tokens.new_full((shape[0] * shape[1],), PAD).index_copy(0, at, batch.tokens).long().view(shape)
    x = None
    if embedded is not None:
        x = embedded.new_zeros(tokens.numel(), embedded.shape[1]).index_copy(0, at, embedded).unflatten(0, shape)
    last = model.config.layers
    wanted = {*layers, *(pool.layer for pool in pools), *([last] if rows is not None else [])}
    if model.padded_call and x is None and scale is None:
        found = model(tokens, wanted, attentions, contacts)  # with what is attached to the model itself
    else:
        found = forward(model, tokens, wanted, attentions, contacts, x=x, scale=scale)
    wide = accumulate_dtype(model.dtype)
    every = {number: padded.flatten(0, 1)[at].to(wide) for number, padded in found["representations"].items()}
    out = Outputs({number: x for number, x in every.items() if number in layers})
    for layer, name, share in pools:
        out.pooled.append(ops.POOLS[name](every[layer], batch.cu_seqlens, share, backend=model.backend))
    if rows is not None:
        out.rows = every[last].index_select(0, rows)
    if logits:
        out.logits = found["logits"].flatten(0, 1)[at]
    if attentions:
        out.attentions = [maps[:, :, :n, :n] for maps, n in zip(found["attentions"], lengths, strict=True)]
    if contacts:
        fill = torch.sigmoid(model.contact_head.regression.bias.detach().float()).item()
        out.contacts = [_whole(part, n, fill) for part, n in zip(found["contacts"], lengths, strict=True)]
    return out


def _whole(padded: torch.Tensor, length: int, fill: float) -> torch.Tensor:
    """(T, T) of one sequence: rows and columns of <cls> and <eos> hold what the regression's bias alone gives."""
    whole, residues = padded.new_full((length, length), fill), max(0, length - 2)
    whole[1 : 1 + residues, 1 : 1 + residues] = padded[:residues, :residues]
    return whole
