"""What all families compute: a pre-LN transformer over packed batches, rows of all sequences one after the other.

There is no padding; `compat` gives the models the APIs that fair-esm and Hugging Face users know.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from .. import ops
from ..alphabet import EOS, PAD, TOKENS
from ..sequences.batching import PackedBatch
from .family import Config
from .layers import ContactHead, LayerNorm, LMHead, TransformerLayer


@dataclass
class Outputs:
    """What was asked for, in packed order. T is a sequence's length in tokens, <cls> and <eos> included.

    representations: {layer: (n, embed_dim)}, layer 0 the embedding, k < layers the stream after block k, the last after
        the final layer norm; in fp32 (fp64) even for half weights.
    pooled: what `pools` made, in their order. rows: (m, embed_dim), the last representation at the rows asked for.
    logits: (n, 33). attentions: per sequence (layers, heads, T, T).
    contacts: per sequence (T, T) probabilities; rows and columns of <cls> and <eos> hold the regression's bias alone.
    """

    representations: dict[int, torch.Tensor] = field(default_factory=dict)
    pooled: list[torch.Tensor] = field(default_factory=list)
    rows: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    attentions: list[torch.Tensor] | None = None
    contacts: list[torch.Tensor] | None = None


class Encoder(nn.Module):
    """A model on packed batches; parameter names are fair-esm's. A family's own class says what positions are.

    backend: name of the backend for every op it implements, or None for the best one that can run.
    recompute: whether the backward pass computes each layer again instead of keeping what is inside it.
    """

    recompute = False

    def __init__(self, config: Config, *, backend: str | None = None):
        super().__init__()
        self.config = config
        self.backend = backend
        width, eps = config.embed_dim, config.layer_norm_eps
        self.embed_tokens = nn.Embedding(len(TOKENS), width, padding_idx=PAD)
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.ffn_embed_dim, config.attention_heads, eps) for _ in range(config.layers)
        )
        self.contact_head = ContactHead(config.layers * config.attention_heads)
        self.make_positions()
        self.emb_layer_norm_after = LayerNorm(width, eps)
        self.lm_head = LMHead(width, self.embed_tokens.weight, eps)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def forward_packed(
        self,
        batch: PackedBatch,
        *,
        layers=(),
        pools=(),
        rows=None,
        logits=False,
        attentions=False,
        contacts=False,
        scale=None,
        keep=None,
        embedded=None,
    ) -> Outputs:
        """Runs the model on a packed batch and returns only what is asked for; unneeded last layers are not run.

        Args:
            batch: on the model's device.
            layers: which representations, 0 to config.layers.
            pools: `ops.StackPool`s of representations, which are pooled as the layers go by and are not kept.
            rows: (m,) int64, ascending: where the last representation is wanted. If nothing else needs all of it, the
                last layer's feed-forward block runs on these alone.
            scale: (sequences,) token-dropout factors in place of the model's own count (see `ops.embedding`).
            keep: (n,) bool, the tokens that are residues for `contacts`; by default all but each sequence's first and
                every <eos>.
            embedded: (n, embed_dim), the residual stream to begin with in place of the embedding of `batch.tokens`.
        """
        if contacts:
            self.contact_head.require_fitted()
        last, all_rows = self.config.layers, logits or attentions or contacts
        depth = last if all_rows or rows is not None else max([*layers, *(pool.layer for pool in pools)], default=0)
        some_rows = rows is not None and not all_rows and last not in (*layers, *(pool.layer for pool in pools))
        whole = depth - some_rows  # layers that run on all rows
        out = Outputs(attentions=[] if attentions else None)
        seen = _Seen(self, batch, layers, pools, out)
        x = self.embed(batch, scale) if embedded is None else embedded
        seen.add(0, x)
        maps = _Maps(self, batch, attentions=attentions, contacts=contacts, keep=keep)
        rotary = self.rotary(batch) if depth else None
        all_at_once = None
        if whole and not (attentions or contacts):
            all_at_once = ops.transformer_stack.kernel_call(self.backend, **self._stack(x, batch, rotary, whole, seen))
        if all_at_once is not None:
            x, *found = all_at_once()
            seen.add_inner(found)
        else:
            for number, layer in enumerate(self.layers[:whole], start=1):
                x, *qk = layer(
                    x,
                    batch,
                    rotary,
                    return_qk=attentions or contacts,
                    recompute=self.recompute and torch.is_grad_enabled(),
                    backend=self.backend,
                )
                if qk:
                    maps.add(number - 1, *qk)
                if number < last:
                    seen.add(number, x)
        if some_rows:
            (x,) = self.layers[-1](x, batch, rotary, rows=rows, backend=self.backend)
        if depth == last:
            x = self.emb_layer_norm_after(x)
            seen.add(last, x)
        if rows is not None:
            out.rows = x if some_rows else x.index_select(0, rows)
        if logits:
            out.logits, _ = self.lm_head(x, backend=self.backend)
        out.attentions, out.contacts = maps.finish()
        return out

    def _stack(self, x: torch.Tensor, batch: PackedBatch, rotary, depth: int, seen: "_Seen") -> dict:
        """The arguments of `ops.transformer_stack` for the first `depth` layers."""
        return dict(
            x=x,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            layers=[layer.weights() for layer in self.layers[:depth]],
            heads=self.config.attention_heads,
            return_layers=seen.inner_layers,
            rotary=rotary,
            pools=seen.inner_pools,
        )

    def make_positions(self) -> None:
        """Makes the parameters that stand before the layers, beside the token table; some families have none."""

    def rotary(self, batch: PackedBatch) -> torch.Tensor | None:
        """The tables of `ops.pre_ln_attention` for a batch, where positions are rotary."""
        return None

    def embed(self, batch: PackedBatch, scale) -> torch.Tensor:
        """What the first layer gets, (n, embed_dim); see `forward_packed` for scale."""
        raise NotImplementedError

    def positions(self, counted: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """What a padded batch's tokens have as `PackedBatch.positions` in this family.

        Args:
            counted: a row's tokens that are no padding, from PAD + 1 on, PAD for padding. columns: of the padded batch,
                from 0 on. Both have the shape of what is returned.
        """
        return counted

    @property
    def position_rows(self) -> int | None:
        """Rows of the table that `PackedBatch.positions` are numbers of; None where there is no table."""
        return None

    def reset_buffers(self) -> None:
        """Gives what is no parameter its first value, in a model made without values."""

    def clear_padding(self) -> None:
        """Makes the rows of padding in all tables zero, as training leaves them."""
        for table in self.modules():
            if isinstance(table, nn.Embedding):
                table.weight[table.padding_idx] = 0

    def tied(self) -> dict[str, str]:
        """Of the state_dict, the keys that are others once more: {key: the one it is}. Files hold each tensor once."""
        return {} if self.lm_head is None else {"lm_head.weight": "embed_tokens.weight"}


class _Seen:
    """Keeps or pools what is wanted of the stream while the layers go by."""

    def __init__(self, model: Encoder, batch: PackedBatch, layers, pools, out: Outputs):
        self.model, self.batch, self.layers, self.pools, self.out = model, batch, layers, pools, out
        out.pooled = [None] * len(pools)
        last = model.config.layers
        self.inner_layers = [number for number in layers if 0 < number < last]
        self._places = [place for place, pool in enumerate(pools) if 0 < pool.layer < last]

    @property
    def inner_pools(self) -> list[ops.StackPool]:
        return [self.pools[place] for place in self._places]

    def add(self, number: int, x: torch.Tensor) -> None:
        if number in self.layers:
            self.out.representations[number] = x
        for place, (layer, name, rows) in enumerate(self.pools):
            if layer == number:
                pool = ops.POOLS[name]
                self.out.pooled[place] = pool(x, self.batch.cu_seqlens, rows, backend=self.model.backend)

    def add_inner(self, found: list[torch.Tensor]) -> None:
        """What `ops.transformer_stack` returned beside the stream."""
        streams, pooled = found[: len(self.inner_layers)], found[len(self.inner_layers) :]
        self.out.representations |= dict(zip(self.inner_layers, streams, strict=True))
        for place, rows in zip(self._places, pooled, strict=True):
            self.out.pooled[place] = rows


class _Maps:
    """Collects attention maps, or only their sum for contacts, while the layers go by."""

    def __init__(self, model: Encoder, batch: PackedBatch, *, attentions: bool, contacts: bool, keep):
        self.model, self.batch = model, batch
        self.scale = (model.config.embed_dim // model.config.attention_heads) ** -0.5
        self.attentions = [[] for _ in range(len(batch))] if attentions else None
        self.contacts = 0.0 if contacts else None
        if contacts and keep is None:
            first = torch.zeros(len(batch.tokens) + 1, dtype=torch.bool, device=batch.tokens.device)
            first[batch.cu_seqlens[:-1].long()] = True  # an empty sequence at the end begins behind the tokens
            keep = (batch.tokens != EOS) & ~first[:-1]
        self.keep = keep
        self.lengths = batch.lengths.tolist() if attentions or contacts else []  # waits for a GPU, once a batch
        self.size = sum(length**2 for length in self.lengths)

    def add(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
        backend, heads = self.model.backend, q.shape[1]
        if self.attentions is not None:
            parts = zip(self.attentions, q.split(self.lengths), k.split(self.lengths), strict=True)
            for maps, q_part, k_part in parts:
                scores = (q_part * self.scale).transpose(0, 1) @ k_part.permute(1, 2, 0)
                lengths = torch.tensor([len(q_part)], device=q.device)
                maps.append(ops.masked_softmax(scores[None], lengths, backend=backend)[0])
        if self.contacts is not None:
            weight = self.model.contact_head.regression.weight[0, layer * heads : (layer + 1) * heads]
            ends = self.batch.cu_seqlens, self.batch.max_seqlen, self.size
            share = ops.contact_map(q, k, *ends, self.keep, weight, self.scale, backend=backend)
            self.contacts = self.contacts + share

    def finish(self):
        attentions = contacts = None
        if self.attentions is not None:
            attentions = [torch.stack(maps) for maps in self.attentions]
        if self.contacts is not None:
            bias = self.model.contact_head.regression.bias.to(self.contacts.dtype)
            flat = torch.sigmoid(self.contacts + bias).split([length**2 for length in self.lengths])
            contacts = [piece.view(length, length) for piece, length in zip(flat, self.lengths, strict=True)]
        return attentions, contacts
