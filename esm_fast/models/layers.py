"""The layers that all families share, as nn.Modules that hold parameters and call ops, for inference and training.

Parameter names are fair-esm's, so a state_dict goes either way.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..alphabet import EOS
from ..ops.common import accumulate_dtype, gelu, layer_norm
from ..ops.pre_ln_attention import rotate
from ..sequences.batching import PackedBatch
from .attached import acts_on_rows, fixed, is_plain, left_out, require_numbers, require_own


@acts_on_rows
class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with fp32 statistics and an fp32 result, whatever the weights are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None or self.bias is None:  # taken out by a user
            x = x.to(accumulate_dtype(x.dtype))
            given = [None if part is None else part.to(x.dtype) for part in (self.weight, self.bias)]
            return F.layer_norm(x, self.normalized_shape, *given, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)


class SelfAttention(nn.Module):
    """The projections of one attention block. Packed, `TransformerLayer` computes it; called, it is fair-esm's."""

    add_zero_attn, bias_k, bias_v, dropout = False, None, None, 0.0  # fair-esm's forward reads them
    __setattr__ = fixed("add_zero_attn", "bias_k", "bias_v", "dropout", "num_heads", "head_dim")

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = width, heads, width // heads
        self.scaling = self.head_dim**-0.5
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, query, key=None, value=None, key_padding_mask=None, need_weights=True, need_head_weights=False,
                attn_mask=None):  # fmt: skip
        """fair-esm's padded call: query (T, B, width) -> the same, and (heads, B, T, T) or their mean (B, T, T)."""
        query = _cast(query, self.q_proj)
        q, k, v = (self._heads(part(query), part is self.v_proj) for part in (self.q_proj, self.k_proj, self.v_proj))
        scale = self.__dict__.get("scaling", self.head_dim**-0.5)  # files of whole models may be older than it
        scores = (q * scale) @ k.transpose(-1, -2)  # (B, heads, T, T)
        if attn_mask is not None:
            scores = scores + attn_mask
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None], float("-inf"))
        weights = scores.softmax(-1, dtype=accumulate_dtype(scores.dtype))
        mixed = (weights.to(v.dtype) @ v).permute(2, 0, 1, 3).flatten(2)
        weights = weights.transpose(0, 1)
        return self.out_proj(mixed), weights if need_head_weights else weights.mean(0)

    def _heads(self, x: torch.Tensor, values: bool) -> torch.Tensor:
        """(T, B, width) -> (B, heads, T, head_dim); queries and keys rotated where positions are rotary."""
        length, count, _ = x.shape
        rotation = self._modules.get("rot_emb")
        x = x.reshape(length, count * self.num_heads, self.head_dim)
        if rotation is not None and not values:
            x = rotate(x, rotation(torch.arange(length, device=x.device)))
        return x.unflatten(1, (count, self.num_heads)).permute(1, 2, 0, 3)


class Halves(NamedTuple):
    """Of a layer's attention and feed-forward blocks, whether the parameters of their modules say all."""

    attention: bool
    ffn: bool


class TransformerLayer(nn.Module):
    """One pre-LN layer: attention and feed-forward, each added to the residual stream.

    hidden_dropout, attention_dropout: the probabilities of a model of another package in training; else 0.
    """

    hidden_dropout = attention_dropout = 0.0

    def __init__(self, width: int, hidden: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.self_attn = SelfAttention(width, heads)
        self.self_attn_layer_norm = LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = LayerNorm(width, eps)

    def halves(self, path: str) -> Halves:
        """Raises NotPackable; see `attached`."""
        own, attention = self._modules, self._modules["self_attn"]
        require_own(self, TransformerLayer, path)
        require_own(attention, SelfAttention, f"{path}.self_attn")
        size = attention.embed_dim // self.heads
        require_numbers(attention, f"{path}.self_attn", num_heads=self.heads, head_dim=size, scaling=size**-0.5)
        plain = [is_plain(own["self_attn_layer_norm"], LayerNorm, f"{path}.self_attn_layer_norm")]
        for name in PROJECTIONS:
            plain.append(is_plain(attention._modules[name], nn.Linear, f"{path}.self_attn.{name}"))
        ffn = [is_plain(own["final_layer_norm"], LayerNorm, f"{path}.final_layer_norm")]
        ffn += [is_plain(own[name], nn.Linear, f"{path}.{name}") for name in ("fc1", "fc2")]
        dropped = self.hidden_dropout > 0
        return Halves(all(plain) and not dropped and not self.attention_dropout, all(ffn) and not dropped)

    def weights(self) -> ops.LayerWeights:
        """Of a layer that is plain in both halves."""
        return ops.LayerWeights(
            *self._attention_weights(),
            *self._ffn_weights(),
            attn_eps=self._modules["self_attn_layer_norm"].eps,
            ffn_eps=self._modules["final_layer_norm"].eps,
        )

    def _attention_weights(self) -> list[torch.Tensor]:
        inner = self._modules["self_attn"]._modules  # by way of attributes it would take ten times as long
        parts = [self._modules["self_attn_layer_norm"], *(inner[name] for name in PROJECTIONS)]
        return [part._parameters[name] for part in parts for name in ("weight", "bias")]

    def _ffn_weights(self) -> list[torch.Tensor]:
        parts = [self._modules[name] for name in ("final_layer_norm", "fc1", "fc2")]
        return [part._parameters[name] for part in parts for name in ("weight", "bias")]

    def packed(self, x, batch: PackedBatch, rotary, halves: Halves, *, rows=None, return_qk=False, recompute=False,
               backend=None):  # fmt: skip
        """x (n, width) -> (x,), or (x, q, k) with q and k (n, heads, head_dim) as the attention saw them.

        rotary: the tables of `ops.pre_ln_attention`, or None.
        rows: (m,) int64, ascending: the only rows that are wanted; the feed-forward block runs on these.
        recompute: keep nothing of the layer but its input for the backward pass, which runs it again
        (Chen et al. 2016).
        """
        run = partial(checkpoint, self._run, use_reentrant=False) if recompute else self._run
        # Of now: when the backward pass comes, a cast of the parameters may be gone from the module.
        attention = self._attention_weights() if halves.attention else None
        return run(attention, self._ffn_weights() if halves.ffn else None, x, batch, rotary, rows, return_qk, backend)

    def _run(self, attention, ffn, x, batch: PackedBatch, rotary, rows, return_qk: bool, backend: str | None):
        if attention is None:
            x, *qk = self._attention_by_modules(x, batch, rotary, return_qk, backend)
        else:
            attended = ops.pre_ln_attention(
                x,
                batch.cu_seqlens,
                batch.max_seqlen,
                *attention,
                heads=self.heads,
                eps=self.self_attn_layer_norm.eps,
                rotary=rotary,
                return_qk=return_qk,
                backend=backend,
            )
            x, *qk = attended if return_qk else (attended,)
        if rows is not None:
            x = x.index_select(0, rows)
        if ffn is None:
            x = self._ffn_by_modules(x)
        else:
            x = ops.gelu_ffn(x, *ffn, eps=self.final_layer_norm.eps, backend=backend)
        return x, *qk

    def _attention_by_modules(self, x, batch: PackedBatch, rotary, return_qk: bool, backend: str | None):
        """As `ops.pre_ln_attention`, its modules called: on packed rows, so that there is no padding all the same."""
        inner, (n, width) = self.self_attn, x.shape
        normed = self.self_attn_layer_norm(x)
        projections = inner.q_proj, inner.k_proj, inner.v_proj
        q, k, v = (part(_cast(normed, part)).view(n, self.heads, width // self.heads) for part in projections)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        mixed = _attend(q, k, v, batch, inner.head_dim**-0.5, self.attention_dropout, backend).reshape(n, width)
        x = x + F.dropout(inner.out_proj(_cast(mixed, inner.out_proj)), self.hidden_dropout).to(x.dtype)
        return (x, q, k) if return_qk else (x,)

    def _ffn_by_modules(self, x):
        hidden = gelu(self.fc1(_cast(self.final_layer_norm(x), self.fc1)))
        return x + F.dropout(self.fc2(_cast(hidden, self.fc2)), self.hidden_dropout).to(x.dtype)

    def forward(self, x, self_attn_mask=None, self_attn_padding_mask=None, need_head_weights=False):
        """fair-esm's padded call: x (T, B, width) -> the same, and the attention's maps."""
        normed = self.self_attn_layer_norm(x)
        attended, maps = self.self_attn(
            query=normed,
            key=normed,
            value=normed,
            key_padding_mask=self_attn_padding_mask,
            need_weights=True,
            need_head_weights=need_head_weights,
            attn_mask=self_attn_mask,
        )
        x = x + attended
        hidden = gelu(self.fc1(_cast(self.final_layer_norm(x), self.fc1)))
        return x + self.fc2(_cast(hidden, self.fc2)), maps


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")  # as `ops.pre_ln_attention` takes them


def _cast(x: torch.Tensor, part: nn.Module) -> torch.Tensor:
    """In the dtype that a module computes in."""
    dtype = next((tensor.dtype for tensor in part.parameters() if tensor.is_floating_point()), x.dtype)
    return x.to(dtype)


def _attend(q, k, v, batch: PackedBatch, scale: float, dropout: float, backend: str | None) -> torch.Tensor:
    """`ops.attention_varlen`, or with dropout of the attention's weights, which no kernel has, torch's."""
    if not dropout:
        return ops.attention_varlen(q, k, v, batch.cu_seqlens, batch.max_seqlen, scale, backend=backend)
    lengths, mixed = batch.lengths.tolist(), []
    for qkv in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        heads_first = (part.transpose(0, 1)[None] for part in qkv)
        mixed.append(F.scaled_dot_product_attention(*heads_first, dropout_p=dropout, scale=scale)[0].transpose(0, 1))
    return torch.cat(mixed) if mixed else torch.zeros_like(q)


@acts_on_rows
class LMHead(nn.Module):
    """RoBERTa's head; its projection is the token table, the very same Parameter."""

    def __init__(self, width: int, token_table: nn.Parameter, eps: float):
        super().__init__()
        self.weight = token_table
        self.bias = nn.Parameter(torch.zeros(token_table.shape[0]))
        self.dense = nn.Linear(width, width)
        self.layer_norm = LayerNorm(width, eps)

    def is_plain(self, path: str) -> bool:
        """Raises NotPackable; see `attached`."""
        own = self._modules
        plain = [
            is_plain(self, LMHead, path),
            is_plain(own["dense"], nn.Linear, f"{path}.dense"),
            is_plain(own["layer_norm"], LayerNorm, f"{path}.layer_norm"),
        ]
        return all(plain)

    def weights(self) -> dict:
        """Of a plain head, the arguments of `ops.masked_lm_head`."""
        dense, norm = self.dense, self.layer_norm
        return dict(
            dense_weight=dense.weight,
            dense_bias=dense.bias,
            ln_weight=norm.weight,
            ln_bias=norm.bias,
            token_table=self.weight,
            bias=self.bias,
            eps=norm.eps,
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """fair-esm's call: (..., width) -> logits."""
        hidden = gelu(self.dense(_cast(features, self.dense)))
        return F.linear(self.layer_norm(hidden).to(self.weight.dtype), self.weight, self.bias)


_NO_REGRESSION = (
    "this checkpoint holds no contact regression (some models were published without one; for others put "
    "<name>-contact-regression.pt beside <name>.pt and load again; esm-fast fit-contacts fits one), so "
    "contacts cannot be predicted"
)


class ContactHead(nn.Module):
    """Logistic regression over all attention maps, as coefficients: (1, layers * heads) and one bias."""

    def __init__(self, maps: int):
        super().__init__()
        self.regression = nn.Linear(maps, 1)
        self.activation = nn.Sigmoid()
        self.prepend_bos, self.append_eos, self.eos_idx = True, True, EOS

    __setattr__ = fixed("prepend_bos", "append_eos", "eos_idx")

    def require_fitted(self, maps: int | None = None) -> None:
        """Raises ValueError when no regression was loaded (all zero), as from bare files of fair-esm, or for other
        maps than the model has, where that number is given."""
        weight = self.regression.weight
        if maps is not None and weight.shape[-1] != maps:
            raise ValueError(
                f"the contact regression was fitted to {weight.shape[-1]} attention maps, this model has {maps}: "
                "layers were taken out or put in, so contacts cannot be predicted"
            )
        fitted = weight.detach().any()
        if torch.compiler.is_compiling():
            torch._assert_async(fitted, _NO_REGRESSION)  # a graph cannot branch on a value; this raises when it runs
        elif not fitted:
            raise ValueError(_NO_REGRESSION)

    def forward(self, tokens: torch.Tensor, attentions: torch.Tensor) -> torch.Tensor:
        """fair-esm's padded call: (B, T), (B, layers, heads, T, T) -> (B, T - 2, T - 2) probabilities."""
        real = (tokens != EOS).to(attentions)
        maps = (attentions * (real[:, :, None] * real[:, None, :])[:, None, None])[..., 1:-1, 1:-1].flatten(1, 2)
        maps = maps + maps.transpose(-1, -2)
        rows, whole = maps.sum(-1, keepdim=True), maps.sum((-1, -2), keepdim=True)
        maps = maps - rows * rows.transpose(-1, -2) / whole
        logits = self.regression(_cast(maps, self.regression).permute(0, 2, 3, 1))
        activation = self._modules.get("activation", torch.sigmoid)  # files of whole models may be older than it
        return activation(logits).squeeze(-1)


left_out(LayerNorm, SelfAttention, TransformerLayer, LMHead, ContactHead)
