"""Hugging Face's API: transformers' ESM classes with another forward, computing only the tokens that are there.

Parameters, state_dict, configuration, save_pretrained and outputs are transformers' own. What cannot run packed (see
`shared`; also decoders, 4-D masks, cross-attention) runs on transformers' code, and a warning says why.

Where attention_mask is 0, hidden states, attentions and logits are 0; transformers leaves there what it computed for
padding.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, MaskedLMOutput
from transformers.utils import can_return_tuple

from .. import hub, ops, weights
from ..alphabet import MASK, PAD, TOKENS
from ..models.encoder import Encoder
from ..models.family import of_config
from ..models.padded import contact_tokens, pad_attentions, pad_contacts, pad_rows
from ..models.results import Outputs
from .hf_host import HEAD, LAYOUT, PackedInput, check_inputs, pack_input
from .hf_tokenizer import EsmTokenizer
from .shared import NotPackable, PackedEncoder, find, warn_not_packed

# Arguments that are handled, or have no effect in transformers' ESM; any other may mean something to its attention.
_KNOWN = {"output_hidden_states", "output_attentions", "use_cache", "token_type_ids", "num_items_in_batch"}


@dataclass
class _Run:
    """What the encoder computed, still packed; the properties are padded and in the model's dtype."""

    input: PackedInput
    model: Encoder
    out: Outputs
    selected: set[int] | None  # the hidden states asked for

    @property
    def last(self) -> torch.Tensor:
        """(n, hidden_size), packed."""
        return self.out.representations[self.model.config.layers]

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """(n, width) -> (B, T, width), 0 where attention_mask is 0."""
        return pad_rows(packed.to(self.model.dtype), self.input.rows, self.input.shape, self.model.backend)

    @property
    def hidden_states(self) -> tuple | None:
        if self.selected is None:
            return None
        states = self.out.representations
        return tuple(self.pad(states[i]) if i in self.selected else None for i in range(self.model.config.layers + 1))

    @property
    def attentions(self) -> tuple | None:
        if self.out.attentions is None:
            return None
        given = self.input
        padded = pad_attentions(self.out.attentions, self.model.config, given.batch, given.rows, given.shape)
        return padded.to(self.model.dtype).unbind(1)

    @property
    def contacts(self) -> torch.Tensor:
        given, bias = self.input, self.model.contact_head.regression.bias
        return pad_contacts(self.out.contacts, bias, given.batch, given.rows, given.shape).to(self.model.dtype)


def _selected(asked: bool | int | list[int] | None, depth: int) -> set[int] | None:
    """Which hidden states: all for True, those of a number or list (negative numbers count from the last), or None."""
    if not asked:
        return None
    if asked is True:
        return set(range(depth + 1))
    numbers = [asked] if isinstance(asked, int) else asked
    return {number % (depth + 1) for number in numbers if -depth - 1 <= number <= depth}


class _Pretrained:
    """from_pretrained that also takes esm_fast's names and files."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers' method, and besides its folders and names it takes fair-esm's name of a published model,
        found in the torch-hub or Hugging Face cache or downloaded; a fair-esm .pt file; and one of `esm-fast convert`.

        Raises:
            FileNotFoundError, weights.CheckpointError: see `esm_fast.load`. OSError: see transformers.
        """
        name = pretrained_model_name_or_path
        path = None if name is None else Path(name).expanduser()
        if name is not None and hub.is_published(name):
            path = hub.cached(hub.canonical_name(name)) if kwargs.get("local_files_only") else hub.resolve(name)
        if path is None or not path.is_file():
            return super().from_pretrained(path if path and path.is_dir() else name, *args, **kwargs)
        checkpoint = weights.read(path).unpacked()
        fields = of_config(checkpoint.config).hf_config(checkpoint.config)
        config, kwargs = transformers.EsmConfig.from_dict(fields, return_unused_kwargs=True, **kwargs)
        tensors = _hf_tensors(cls, config, checkpoint)
        model = super().from_pretrained(None, *args, config=config, state_dict=tensors, **kwargs)
        model.name_or_path = model.config.name_or_path = str(name)
        return model


class EsmModel(_Pretrained, PackedEncoder, transformers.EsmModel):
    """transformers' EsmModel, computing packed."""

    esm_fast_layout = LAYOUT

    def _apply(self, fn, recurse=True):
        """What .to(dtype) and .bfloat16() do: frequencies of positions stay fp32, or positions would be rounded."""
        kept = [(module, module._buffers.get("inv_freq")) for module in self.modules()]
        super()._apply(fn, recurse)
        for module, before in kept:
            if before is not None and not before.is_meta and before.dtype != module._buffers["inv_freq"].dtype:
                module._buffers["inv_freq"] = before.to(module._buffers["inv_freq"].device)
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        *,
        packed=True,
        **kwargs,
    ):
        """As transformers' forward.

        Args:
            input_ids: (B, T) integers; positions count those that are not <pad>, unless position_ids (B, T) are given.
            attention_mask: (B, T) of 0 and 1, in any pattern; None keeps every token, padding included.
            inputs_embeds: (B, T, hidden_size), what the first layer gets, in place of input_ids.
            packed: False runs transformers' own code.

        Returns:
            BaseModelOutputWithPoolingAndCrossAttentions, or a tuple. Its rows are 0 where attention_mask is 0.

        Raises:
            ValueError: ids or positions outside the tables.
        """
        inputs = (input_ids, attention_mask, position_ids, inputs_embeds)
        kwargs |= dict(encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask)
        if packed:
            check_inputs(*inputs)
            try:
                run = self.run_packed(*inputs, **kwargs)
            except NotPackable as reason:
                warn_not_packed(reason)
            else:
                return self._output(run)
        return super().forward(*inputs, return_dict=True, **kwargs)

    def predict_contacts(self, tokens, attention_mask=None):
        """Contact probabilities (B, T - 2, T - 2), streamed over the heads: no attention map is stored.

        Args:
            tokens: (B, T). attention_mask: (B, T) of 0 and 1; None keeps all but <pad>.

        Raises:
            ValueError: the contact regression is all zero; or the model cannot run packed and its attention is not
                "eager", which transformers needs.
        """
        check_inputs(tokens, attention_mask)
        if attention_mask is None:
            attention_mask = (tokens != PAD).long()
        try:
            return self.run_packed(tokens, attention_mask, contacts=True).contacts
        except NotPackable as reason:
            if self.config._attn_implementation != "eager":
                raise NotPackable(f"contacts need a model loaded with attn_implementation='eager': {reason}") from None
            warn_not_packed(reason)
            return super().predict_contacts(tokens, attention_mask)

    def run_packed(
        self, input_ids, attention_mask=None, position_ids=None, inputs_embeds=None, *, contacts=False, **options
    ) -> _Run:
        """Runs the encoder on the kept tokens; raises NotPackable where ours cannot. For this package's own classes."""
        for name, value in options.items():
            if value is not None and value is not False and name not in _KNOWN:
                raise NotPackable(f"the argument {name} is not for packed tokens")
        model = self.esm_fast_shadow()
        given = pack_input(model, input_ids, attention_mask, position_ids, inputs_embeds)
        depth = model.config.layers
        selected = None if contacts else _selected(self._asked("output_hidden_states", options), depth)
        out = model.forward_packed(
            given.batch,
            layers={depth, *(selected or ())},
            attentions=not contacts and bool(self._asked("output_attentions", options)),
            contacts=contacts,
            scale=given.scale,
            keep=contact_tokens(input_ids).to(model.device).flatten()[given.rows] if contacts else None,
            embedded=given.embedded,
        )
        return _Run(given, model, out, selected)

    def _asked(self, name: str, options: dict):
        return options.get(name, getattr(self.config, name, False))

    def _output(self, run: _Run):
        states = run.hidden_states
        last = states[-1] if states and states[-1] is not None else run.pad(run.last)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=None if self.pooler is None else self.pooler(last),
            hidden_states=states,
            attentions=run.attentions,
            cross_attentions=None if run.out.attentions is None else (),  # as transformers returns it
        )


class EsmForMaskedLM(_Pretrained, transformers.EsmForMaskedLM):
    """transformers' EsmForMaskedLM, computing encoder and language-model head packed."""

    def __init__(self, config):
        super().__init__(config)
        self.esm.__class__ = EsmModel

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        labels=None,
        *,
        packed=True,
        **kwargs,
    ):
        """As transformers' forward; see `EsmModel.forward` for the arguments.

        labels: (B, T), -100 where there is none; the loss is their mean cross-entropy. Returns MaskedLMOutput, or a
        tuple.
        """
        kwargs |= dict(encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask)
        kwargs |= dict(inputs_embeds=inputs_embeds, position_ids=position_ids, return_dict=True)
        if packed:
            check_inputs(input_ids, attention_mask, position_ids, inputs_embeds, labels)
        rows = _attended_rows(attention_mask)
        try:
            if packed:
                _require_labels_attended(labels, rows)
        except NotPackable as reason:
            warn_not_packed(reason)
            packed = False
        if not packed or not self._head_is_known():
            return super().forward(input_ids, attention_mask, labels=labels, packed=packed, **kwargs)
        outputs = self.esm(input_ids, attention_mask, **kwargs)
        last = outputs.last_hidden_state
        rows = None if rows is None else rows.to(last.device)
        backend = getattr(self.esm, "esm_fast_backend", None)
        logits = self._logits(last.flatten(0, 1), rows, backend)
        loss = None
        if labels is not None:
            labels = labels.to(logits.device).flatten()
            loss = F.cross_entropy(logits, labels if rows is None else labels[rows])
        shape = last.shape[:2]
        return MaskedLMOutput(
            loss=loss,
            logits=logits.unflatten(0, shape) if rows is None else pad_rows(logits, rows, shape, backend),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def predict_contacts(self, tokens, attention_mask=None):
        """See `EsmModel.predict_contacts`."""
        return self.esm.predict_contacts(tokens, attention_mask)

    def _head_is_known(self) -> bool:
        try:
            if find(self, HEAD)["lm_head.decoder"].bias is not None:
                raise NotPackable("lm_head.decoder has a bias of its own")
        except NotPackable as reason:
            warn_not_packed(reason)
            return False
        return True

    def _logits(self, x: torch.Tensor, rows: torch.Tensor | None, backend: str | None) -> torch.Tensor:
        head = self.lm_head
        logits, _ = ops.masked_lm_head(
            x,
            head.dense.weight,
            head.dense.bias,
            head.layer_norm.weight,
            head.layer_norm.bias,
            head.decoder.weight,
            head.bias,
            rows=rows,
            eps=head.layer_norm.eps,
            backend=backend,
        )
        return logits


def _attended_rows(attention_mask) -> torch.Tensor | None:
    """Rows of the flattened (B, T) that attention_mask keeps; None for all."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask.flatten().nonzero().squeeze(1)


def _require_labels_attended(labels, rows) -> None:
    if labels is None or rows is None:
        return
    present = (labels != -100).flatten()
    if int(present.sum()) != int(present[rows.to(labels.device)].sum()):
        raise NotPackable("there are labels where attention_mask is 0; they should be -100, as padding has no residue")


def _hf_tensors(cls, config, checkpoint: weights.Checkpoint) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, checked, under the names transformers gives them in a model of class cls."""
    tensors = weights.build(checkpoint).state_dict()
    with torch.device("meta"):
        names = {key: of_config(checkpoint.config).from_hf_key(key) for key in cls(config).state_dict()}
    if issubclass(cls, EsmForMaskedLM) and "lm_head.bias" not in tensors:
        raise weights.CheckpointError(f"{checkpoint.source} has no language-model head; load it with EsmModel")
    names.pop("lm_head.decoder.weight", None)  # transformers ties it to the embeddings
    return {key: tensors[name] for key, name in names.items() if name in tensors}


# transformers notes the outputs it can capture when a class is first built. An encoder that only becomes an EsmModel,
# in EsmForMaskedLM or by `accelerate`, must find that note when transformers' own code runs.
with torch.device("meta"):
    EsmModel(
        transformers.EsmConfig(
            vocab_size=len(TOKENS),
            mask_token_id=MASK,
            pad_token_id=PAD,
            hidden_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=1,
        )
    )

# The model card's spelling.
ESMForMaskedLM = EsmForMaskedLM
ESMTokenizer = EsmTokenizer
