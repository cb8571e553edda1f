"""The models' padded call: fair-esm's, padded token batches in, a dictionary out. Padding exists at its edges only.

Each family has a class with fair-esm's name for it, such as `ProteinBertModel`; `api_class` gives it. They are what
`load` returns; `compat` offers them by those names.
"""

from dataclasses import replace

import torch

from .. import ops
from ..alphabet import EOS, TOKENS, Alphabet
from ..sequences.batching import PackedBatch, pack_padded
from . import unfused
from .arguments import refuse_recording, require_tensor
from .attached import NotPackable, fixed, warn_not_packed
from .family import Config, families, of_config

_OF_ALPHABET = ("padding_idx", "mask_idx", "cls_idx", "eos_idx", "prepend_bos", "append_eos")


def token_dropout_of(model: torch.nn.Module, default: bool = False) -> bool:
    """As the forward of fair-esm's classes finds it, of a model that has it already."""
    own = model.__dict__
    return bool(getattr(own["args"], "token_dropout", False) if "args" in own else own.get("token_dropout", default))


class _Padded:
    """A model as `esm.pretrained` returns it, computing on the packed tokens only.

    Differences from fair-esm, all on rows that hold no data: representations and logits of padded rows are 0.
    """

    padded_call = True

    def __init__(self, config: Config, *, backend: str | None = None):
        super().__init__(config, backend=backend)
        self.alphabet = Alphabet.from_architecture("ESM-1b")
        for name, value in of_config(config).fair_esm_attributes(config).items():
            setattr(self, name, value)
        self.alphabet_size = len(self.alphabet)
        self.embed_scale = 1
        for name in _OF_ALPHABET:
            setattr(self, name, getattr(self.alphabet, name))

    __setattr__ = fixed(*_OF_ALPHABET, "embed_scale")  # fair-esm's forward reads them

    @property
    def config(self) -> Config:
        """The sizes; token_dropout as fair-esm's forward would find it now."""
        config = super().config
        wanted = token_dropout_of(self, config.token_dropout)
        return config if config.token_dropout == wanted else replace(config, token_dropout=wanted)

    @property
    def num_layers(self) -> int:
        return self.config.layers

    def forward(self, tokens, repr_layers=(), need_head_weights=False, return_contacts=False) -> dict:
        """Runs a padded batch.

        Args:
            tokens: (B, T) integers, padded with <pad>, within the length that the model takes.
            repr_layers: layers to return, 0 to num_layers; numbers outside are ignored, as fair-esm does.
            need_head_weights: return all attention maps. return_contacts: return contact probabilities, streamed over
                the heads: the maps themselves are only stored (and returned) with need_head_weights.

        Returns:
            "logits" (B, T, 33); "representations" {layer: (B, T, E)}; with need_head_weights "attentions"
            (B, layers, heads, T, T); with return_contacts "contacts" (B, T-2, T-2).

        Raises:
            ValueError: tokens of wrong shape, type, length or value; contacts asked of a model without a regression.
        """
        check_tokens(tokens, self.config.max_residues)
        tokens = tokens.to(self.device)
        try:
            parts = self.examine(contacts=return_contacts)
        except NotPackable as reason:
            if not self.pads_by_itself:
                raise
            warn_not_packed(reason)
            return unfused.forward(self, tokens, repr_layers, need_head_weights, return_contacts)
        batch, rows = pack_padded(tokens)
        batch = replace(batch, positions=self.positions(batch.positions, rows.int() % max(tokens.shape[1], 1)))
        layers = {layer for layer in repr_layers if 0 <= layer <= self.num_layers}
        out = self.run(
            parts,
            batch,
            layers=layers,
            logits=self.lm_head is not None,
            attentions=need_head_weights,
            contacts=return_contacts,
            keep=contact_tokens(tokens).flatten()[rows],
        )
        shape = tokens.shape
        representations = {
            k: pad_rows(x.to(self.dtype), rows, shape, self.backend) for k, x in out.representations.items()
        }
        result = Results(representations=representations)
        if out.logits is not None:
            result["logits"] = pad_rows(out.logits, rows, shape, self.backend)
        if need_head_weights:
            result["attentions"] = pad_attentions(out.attentions, self.config, batch, rows, shape)
        if return_contacts:
            bias = self.contact_head.regression.bias
            result["contacts"] = pad_contacts(out.contacts, bias, batch, rows, shape)
            if not need_head_weights:
                result.make_attentions_later(self, tokens)
        return result

    def predict_contacts(self, tokens) -> torch.Tensor:
        """Contact probabilities (B, T-2, T-2) of a padded batch."""
        return self(tokens, return_contacts=True)["contacts"]


class Results(dict):
    """fair-esm's dictionary. After `return_contacts` alone it has "attentions" too, computed when they are first asked
    for: the contacts did not need them, and they are the largest of all results."""

    _later = None

    def make_attentions_later(self, model: torch.nn.Module, tokens: torch.Tensor) -> None:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._later = model, tokens.clone(), _versions(model), *modes

    def __missing__(self, key):
        if key != "attentions" or self._later is None:
            raise KeyError(key)
        model, tokens, versions, grad, inference = self._later
        if _versions(model) != versions:
            raise KeyError(
                "attentions: the model was changed since these contacts were computed; ask for both in one call, with "
                "need_head_weights=True"
            )
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            self["attentions"] = model(tokens, need_head_weights=True)["attentions"]
        self._later = None
        return self["attentions"]

    def __contains__(self, key) -> bool:
        return super().__contains__(key) or (key == "attentions" and self._later is not None)

    def get(self, key, default=None):
        try:
            return self[key]
        except KeyError:
            return default

    def __reduce__(self):
        return dict, (dict(self),)


def _versions(model: torch.nn.Module) -> list[tuple]:
    """What changes when parameters or modules are changed, for the same numbers."""
    found: list[tuple] = [(id(module), module.training) for module in model.modules()]
    for tensor in model.parameters():
        found.append((id(tensor), None if tensor.is_inference() else tensor._version))
    return found


def _make(name: str, model: type) -> type:
    # Where pickle looks for it, and where files of whole models have it.
    return type(name, (_Padded, model), {"__doc__": _Padded.__doc__, "__module__": "esm_fast.compat.fair_esm"})


_CLASSES = {f.config: _make(f.fair_esm_class.rpartition(":")[2], f.model) for f in families().values()}


def classes() -> dict[str, type]:
    """Every family's class by fair-esm's name for it."""
    return {kind.__name__: kind for kind in _CLASSES.values()}


def api_class(config: Config) -> type:
    """The class, with fair-esm's API, of a model of these sizes."""
    return _CLASSES[type(config)]


def check_tokens(tokens: torch.Tensor, max_residues: int | None) -> None:
    """Raises TypeError or ValueError for tokens no model takes: on a GPU a bad index would only show as a device
    assertion. RuntimeError where torch records the call."""
    refuse_recording()
    require_tensor("tokens", tokens)
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens must be (batch, length) integers, got {tuple(tokens.shape)} {tokens.dtype}")
    if max_residues is not None and tokens.shape[1] > max_residues + 2:
        raise ValueError(
            f"Sequence length {tokens.shape[1]} above maximum  sequence length of {max_residues + 2}: a protein may "
            f"have {max_residues} residues; give truncation_seq_length to the batch converter, or use esm_fast.embed"
        )
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= len(TOKENS)):
        raise ValueError(f"token ids must be 0 to {len(TOKENS) - 1}, got {int(tokens.min())} to {int(tokens.max())}")


def contact_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: the tokens whose attention counts for contacts. The first and the last column are dropped."""
    keep = tokens != EOS
    keep[:, :1] = False
    keep[:, -1:] = False
    return keep


def _positions(batch: PackedBatch, rows: torch.Tensor, width: int) -> list[torch.Tensor]:
    """Per sequence, the columns of the padded batch its tokens stand in."""
    return list((rows % width).split(batch.lengths.tolist()))


def pad_rows(packed: torch.Tensor, rows: torch.Tensor, shape: tuple[int, int], backend: str | None) -> torch.Tensor:
    """(B, T, width) from (n, width); rows of padding are 0."""
    return ops.unpack_rows(packed, rows, shape[0] * shape[1], backend=backend).unflatten(0, shape)


def pad_attentions(attentions, config: Config, batch, rows, shape) -> torch.Tensor:
    """(B, layers, heads, T, T) from per-sequence maps; rows and columns of padding are 0."""
    count, width = shape
    some = attentions[0] if attentions else rows.new_empty(0, dtype=torch.float32)  # a batch of no sequences
    padded = some.new_zeros(count, config.layers, config.attention_heads, width, width)
    for i, (maps, at) in enumerate(zip(attentions, _positions(batch, rows, width), strict=True)):
        padded[i, :, :, at[:, None], at] = maps
    return padded


def pad_contacts(contacts, bias: torch.Tensor, batch, rows, shape) -> torch.Tensor:
    """(B, T-2, T-2) from per-sequence maps; outside the sequences stands what the regression's bias alone gives."""
    count, width = shape
    some = contacts[0] if contacts else bias.detach()  # a batch of no sequences
    padded = some.new_full((count, width, width), torch.sigmoid(bias.detach().to(some.dtype)).item())
    for i, (probabilities, at) in enumerate(zip(contacts, _positions(batch, rows, width), strict=True)):
        padded[i, at[:, None], at] = probabilities
    return padded[:, 1:-1, 1:-1]
