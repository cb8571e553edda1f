"""What all families compute: a pre-LN transformer over packed batches, rows of all sequences one after the other.

There is no padding; `padded` adds the call that fair-esm's users know, `compat` the APIs of other packages.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..alphabet import EOS, MASK, PAD, TOKENS
from ..memory import require_room
from ..ops.common import accumulate_dtype
from ..ops.embedding import token_dropout_scale
from ..sequences.batching import PackedBatch
from . import unfused
from .arguments import Unscriptable, require_tensor
from .attached import NotPackable, is_plain, require_nothing_for_all, require_numbers, require_own, warn_not_packed
from .family import Config
from .glance import Glance
from .layers import ContactHead, Halves, LayerNorm, LMHead, TransformerLayer
from .results import Outputs


class Parts(NamedTuple):
    """What of a model can be computed fused: its embedding, and of each layer both halves."""

    embedding: bool
    halves: list[Halves]
    glance: Glance | None = None  # at all layers, where both halves of each can and are as they were


_glances: WeakKeyDictionary["Encoder", Glance] = WeakKeyDictionary()


class Encoder(Unscriptable, nn.Module):
    """A model on packed batches; parameter names are fair-esm's. A family's own class says what positions are.

    backend: name of the backend for every op it implements, or None for the best one that can run.
    recompute: whether the backward pass computes each layer again instead of keeping what is inside it.
    """

    recompute = False
    before_layer: Callable[[int], None] | None = None  # called with each layer's number before it runs; -1: embedding
    padded_call = False  # whether calling the model takes padded tokens, as fair-esm's does
    pads_by_itself = True  # whether a model that cannot run packed computes padded, as `unfused` does, or raises

    def __init__(self, config: Config, *, backend: str | None = None):
        super().__init__()
        self._config = config
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
    def config(self) -> Config:
        """The sizes, with as many layers as there are: they can be taken out."""
        depth = len(self._modules["layers"])
        return self._config if depth == self._config.layers else replace(self._config, layers=depth)

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

        Raises:
            ValueError: for a batch or arguments that do not fit; contacts of a model without a regression.
                NotPackable: unless it pads by itself, for what `attached` tells.
        """
        asked = dict(layers=layers, pools=pools, rows=rows, logits=logits, attentions=attentions, contacts=contacts)
        own_way = dict(scale=scale, embedded=embedded)
        require_tensor("rows", rows, integers=True, optional=True)
        for name, value in {**own_way, "keep": keep}.items():
            require_tensor(name, value, optional=True)
        if self.padded_call and (self._forward_hooks or self._forward_pre_hooks or "forward" in self.__dict__):
            return unfused.forward_packed(self, batch, **asked, **own_way)  # only a call of the model meets them
        try:
            parts = self.examine(contacts=contacts)
        except NotPackable as reason:
            if not self.pads_by_itself:
                raise
            warn_not_packed(reason)
            return unfused.forward_packed(self, batch, **asked, **own_way)
        return self.run(parts, batch, **asked, **own_way, keep=keep)

    def examine(self, *, contacts: bool) -> "Parts":
        """What of the model can be computed fused; raises NotPackable where nothing can. See `attached`."""
        require_nothing_for_all()
        own = self._modules
        layers = own["layers"]
        require_own(layers, nn.ModuleList, "layers")
        halves, glance = self._look_at(list(layers._modules.values()))
        if contacts:
            require_own(own["contact_head"], ContactHead, "contact_head")
            if (activation := own["contact_head"]._modules.get("activation")) is not None:
                require_own(activation, nn.Sigmoid, "contact_head.activation")
            if not is_plain(own["contact_head"].regression, nn.Linear, "contact_head.regression"):
                raise NotPackable("contact_head.regression has something attached")
            self.contact_head.require_fitted(len(layers) * self._config.attention_heads)
        is_plain(own["emb_layer_norm_after"], LayerNorm, "emb_layer_norm_after")  # which is called in any case
        self._head_is_plain()
        return Parts(self.embedding_is_plain(), halves, glance)

    def _look_at(self, layers: list) -> tuple[list[Halves], Glance | None]:
        """Each layer's halves; raises NotPackable."""
        known = None if torch.compiler.is_compiling() else _glances.get(self)
        if known is not None and known.layers == layers and known.weights() is not None:
            return [Halves(True, True)] * len(layers), known
        halves = []
        for number, layer in enumerate(layers):
            if type(layer) is not TransformerLayer:
                require_own(layer, TransformerLayer, f"layers.{number}")
            halves.append(layer.halves(f"layers.{number}"))
        if not torch.compiler.is_compiling() and all(map(all, halves)):
            _glances[self] = Glance(layers)
        return halves, None

    def _head_is_plain(self) -> bool:
        head = self._modules.get("lm_head")
        if head is None:
            return True
        return head.is_plain("lm_head") if type(head) is LMHead else is_plain(head, LMHead, "lm_head")

    def run(self, parts: "Parts", batch: PackedBatch, *, layers=(), pools=(), rows=None, logits=False,
            attentions=False, contacts=False, scale=None, keep=None, embedded=None) -> Outputs:  # fmt: skip
        """`forward_packed` of a model that was examined."""
        last, all_rows = self.config.layers, logits or attentions or contacts
        depth = last if all_rows or rows is not None else max([*layers, *(pool.layer for pool in pools)], default=0)
        some_rows = rows is not None and not all_rows and last not in (*layers, *(pool.layer for pool in pools))
        whole = depth - some_rows  # layers that run on all rows
        out = Outputs(attentions=[] if attentions else None)
        seen = _Seen(self, batch, layers, pools, out)
        if self.before_layer is not None:
            self.before_layer(-1)
        x = self._embedded(parts, batch, scale) if embedded is None else embedded
        seen.add(0, x)
        maps = _Maps(self, batch, attentions=attentions, contacts=contacts, keep=keep)
        rotary = self.rotary(batch) if depth else None
        all_at_once = None
        if whole and self.before_layer is None and not (attentions or contacts) and all(map(all, parts.halves[:whole])):
            all_at_once = ops.stack_call(self.backend, **self._stack(parts, x, batch, rotary, whole, seen))
        if all_at_once is not None:
            x, *found = all_at_once()
            seen.add_inner(found)
        else:
            for number, layer in enumerate(self.layers[:whole], start=1):
                if self.before_layer is not None:
                    self.before_layer(number - 1)
                x, *qk = layer.packed(
                    x,
                    batch,
                    rotary,
                    parts.halves[number - 1],
                    return_qk=attentions or contacts,
                    recompute=self.recompute and torch.is_grad_enabled(),
                    backend=self.backend,
                )
                if qk:
                    maps.add(number - 1, *qk)
                if number < last:
                    seen.add(number, x)
        if some_rows:
            (x,) = self.layers[-1].packed(x, batch, rotary, parts.halves[-1], rows=rows, backend=self.backend)
        if depth == last:
            x = self.emb_layer_norm_after(x)
            seen.add(last, x)
        if rows is not None:
            out.rows = x if some_rows else x.index_select(0, rows)
        if logits:
            out.logits, _ = self.logits_of(x)
        out.attentions, out.contacts = maps.finish()
        return out

    def logits_of(self, x: torch.Tensor, rows=None, targets=None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(logits, loss) of `ops.masked_lm_head` for packed representations, whatever is attached to the head."""
        head = self.lm_head
        if self.head_is_plain():
            weights = head.weights()
            return ops.masked_lm_head(x, **weights, rows=rows, targets=targets, backend=self.backend)
        logits = head(x if rows is None else x[rows])
        wide = logits.to(accumulate_dtype(logits.dtype))
        return logits, None if targets is None else F.cross_entropy(wide, targets, reduction="sum")

    def head_is_plain(self) -> bool:
        """Whether the language-model head's parameters say all; if not, `logits_of` calls it."""
        try:
            return self._head_is_plain()
        except NotPackable:
            return False

    def _embedded(self, parts: "Parts", batch: PackedBatch, scale) -> torch.Tensor:
        if parts.embedding:
            return self.embed(batch, scale)
        factor = None
        if self.config.token_dropout:
            scale = token_dropout_scale(batch.tokens, batch.cu_seqlens) if scale is None else scale
            lengths = batch.lengths.long()
            factor = torch.repeat_interleave(scale, lengths, output_size=len(batch.tokens))
        return self.embed_by_modules(batch.tokens, batch.positions, factor)

    def embedding_is_plain(self) -> bool:
        """Whether `embed` says all, or the modules before the layers are to be called; raises NotPackable."""
        table = self._modules["embed_tokens"]
        require_numbers(table, "embed_tokens", padding_idx=PAD, max_norm=None)
        return is_plain(table, nn.Embedding, "embed_tokens")

    def embed_by_modules(self, tokens: torch.Tensor, positions: torch.Tensor, factor) -> torch.Tensor:
        """As `embed`, its modules called: on packed or padded tokens, all of one shape.

        factor: what each token's embedding is multiplied by, in the same shape; None where <mask> is a token as others.
        """
        x = self.embed_tokens(tokens)
        x = x.to(accumulate_dtype(x.dtype))
        if factor is not None:
            x = (x * factor[..., None]).masked_fill((tokens == MASK)[..., None], 0.0)
        return x

    def _stack(self, parts: "Parts", x, batch: PackedBatch, rotary, depth: int, seen: "_Seen") -> dict:
        """The arguments of `ops.transformer_stack` for the first `depth` layers."""
        glance = parts.glance
        weights = glance.first(depth) if glance else [layer.weights() for layer in self.layers[:depth]]
        return dict(
            x=x,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            layers=weights,
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
        self.wants_contacts, self.contacts = contacts, None
        if contacts and keep is None:
            first = torch.zeros(len(batch.tokens) + 1, dtype=torch.bool, device=batch.tokens.device)
            first[batch.cu_seqlens[:-1].long()] = True  # an empty sequence at the end begins behind the tokens
            keep = (batch.tokens != EOS) & ~first[:-1]
        self.keep = keep
        self.lengths = batch.lengths.tolist() if attentions or contacts else []  # waits for a GPU, once a batch
        self.size = sum(length**2 for length in self.lengths)
        if self.attentions is not None:
            what = f"a map of each pair of {sum(self.lengths):,} tokens in each of {model.config.layers} layers"
            numbers = model.config.layers * model.config.attention_heads * self.size
            require_room(numbers * model.dtype.itemsize, what, model.device)
        if contacts:  # a sum, and what a layer adds to it
            what = f"a contact of each pair of {sum(self.lengths):,} tokens"
            require_room(2 * self.size * accumulate_dtype(model.dtype).itemsize, what, model.device)

    def add(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
        backend, heads = self.model.backend, q.shape[1]
        if self.attentions is not None:
            parts = zip(self.attentions, q.split(self.lengths), k.split(self.lengths), strict=True)
            for maps, q_part, k_part in parts:
                scores = (q_part * self.scale).transpose(0, 1) @ k_part.permute(1, 2, 0)
                lengths = torch.tensor([len(q_part)], device=q.device)
                maps.append(ops.masked_softmax(scores[None], lengths, backend=backend)[0])
        if self.wants_contacts:
            weight = self.model.contact_head.regression.weight[0, layer * heads : (layer + 1) * heads]
            ends = self.batch.cu_seqlens, self.batch.max_seqlen, self.size
            share = ops.contact_map(q, k, *ends, self.keep, weight, self.scale, backend=backend)
            self.contacts = share if self.contacts is None else self.contacts.add_(share)

    def finish(self):
        attentions = contacts = None
        if self.attentions is not None:
            attentions = [torch.stack(maps) for maps in self.attentions]
        if self.wants_contacts:
            bias = self.model.contact_head.regression.bias.to(self.contacts.dtype)
            flat = self.contacts.add_(bias).sigmoid_().split([length**2 for length in self.lengths])
            contacts = [piece.view(length, length) for piece, length in zip(flat, self.lengths, strict=True)]
        return attentions, contacts
