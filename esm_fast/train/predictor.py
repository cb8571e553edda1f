"""A predictor: a model with a linear head, as `finetune` makes it; it is saved, loaded, and predicts."""

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .. import hub, ops, weights
from ..files.atomic import atomic
from ..inference.embed import token_budget
from ..inference.load import load, random_model
from ..inference.outputs import Output
from ..inference.outputs.pooled import Mean
from ..inference.outputs.prediction import OfAttention, OfProtein, OfResidues, of_row
from ..inference.stream import Protein, run
from ..models.encoder import Encoder
from ..sequences.batching import PackedBatch
from ..sequences.fasta import records_from
from ..sequences.tokenize import Policy, Report, Tokens, tokenize
from . import adapters, heads
from .pairs import KINDS, combined, width_of
from .targets import Targets

_MODEL, _HEAD, _ABOUT = "model.safetensors", "head.safetensors", "finetune.json"
_ADAPTERS = "adapters.safetensors"  # in the place of the model


class PredictorError(ValueError):
    """A folder that holds no predictor, or a damaged one; the message names it."""


class Predictor(nn.Module):
    """A model and its head (see `heads`) on one of its layers. `targets` says what the head's outputs mean.

    adapters: what was merged into the model when it was trained, see `adapters.found`. pairs: of which kind its pairs
    of proteins are (see `pairs`), "" for single ones.
    """

    def __init__(
        self,
        esm: Encoder,
        targets: Targets,
        layer: int | None = None,
        *,
        head: str = "linear",
        hidden: int = 128,
        pairs: str = "",
    ):
        super().__init__()
        self.esm, self.targets, self.pairs = esm, targets, pairs
        self.adapters: dict[str, torch.Tensor] = {}
        self.layer = esm.config.layers if layer is None else layer
        width = width_of(pairs, esm.config.embed_dim)
        self.head = heads.make(head, width, targets.outputs, hidden=hidden, device=esm.device)

    @property
    def per_residue(self) -> bool:
        return self.targets.level == "residue"

    @property
    def of_residues(self) -> bool:
        """Whether the head looks at residues, for their own outputs or for their protein's."""
        return self.per_residue or self.head.of_residues

    def set_head(self, weight: np.ndarray, bias: np.ndarray) -> None:
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(weight))
            self.head.bias.copy_(torch.from_numpy(bias))

    def features(
        self, batch: PackedBatch, representation: torch.Tensor, index: np.ndarray | None = None
    ) -> torch.Tensor:
        """What the head takes, with gradients: (sequences, width), the mean over each one's residues, or (all residues,
        width); or of pairs (pairs, their width).

        representation: (tokens, width), the layer's. index: (pairs, 2), numbers of the batch's sequences.
        """
        share = _residue_share(batch)
        if self.of_residues:
            return representation[share > 0]
        means = ops.pool(representation, batch.cu_seqlens, share, backend=self.esm.backend)
        return combined(self.pairs, means[index[:, 0]], means[index[:, 1]]) if self.pairs else means

    def output(self) -> Output:
        """What the stream makes of each protein: the head's outputs, (outputs,) or (residues, outputs)."""
        head = self._frozen_head()
        if self.per_residue:
            return OfResidues(self.layer, head=head)
        if head.of_residues:
            return OfAttention(self.layer, head=head)
        return OfProtein(self.layer, head=head.cpu())

    def _frozen_head(self) -> nn.Module:
        return copy.deepcopy(self.head).requires_grad_(False).float()

    def outputs(self, tokens: Iterable[Tokens], *, batch_tokens=None, window=None, on_batch=lambda n: None):
        """Streams proteins through model and head, in input order: `stream.Protein`s of one array, outputs of the head:
        at the level of sequences (1, outputs), else (residues, outputs)."""
        budget = token_budget(self.esm, batch_tokens)
        for label, (array,) in run(self.esm, tokens, [self.output()], budget, on_batch, window):
            yield Protein(label, [array if self.per_residue else array[None]])

    def outputs_of_pairs(self, tokens: Iterable[Tokens], index: np.ndarray, *, batch_tokens=None, window=None,
                         on_batch=lambda n: None) -> Iterator[np.ndarray]:  # fmt: skip
        """The head's (1, outputs) for each pair, after all proteins went through the model: 4 bytes x width of each are
        in memory. index: int64 (pairs, 2), the numbers of the proteins."""
        budget, means = token_budget(self.esm, batch_tokens), []
        for _, (mean,) in run(self.esm, tokens, [Mean(self.layer)], budget, on_batch, window):
            means.append(torch.from_numpy(mean.astype(np.float32)))
        head = self._frozen_head().cpu()
        for first, second in index.tolist():  # one by one: others change no bit of it
            yield of_row(head, combined(self.pairs, means[first], means[second]).numpy())[None]

    def predict(self, sequences: Sequence, **options) -> list | dict[str, list]:
        """For each sequence its class or number; at the residue level a list of them; of multi-label classification a
        tuple of classes.

        Of several columns of labels, {column: such a list}.

        Args:
            sequences: strings, or (label, string) pairs; for a predictor of pairs, two strings each.
            options: batch_tokens; unknown, empty ("error", "x" ...) and overlength ("error", "truncate", "window"), as
                for `esm_fast.embed`.

        Raises FastaError for letters or lengths that the model does not take.
        """
        return self._by_column(sequences, self.targets.labels, options)

    def predict_proba(self, sequences: Sequence, **options) -> list | dict[str, list]:
        """For each sequence the probability of each of the target's `classes`, (classes,); at the residue level
        (residues, classes). Of several columns, {column: such a list}. Of multi-label classification, that each of the
        targets' columns is there. Takes what `predict` does.

        Raises ValueError where the predictor gives numbers, not classes.
        """
        if self.targets.task != "classification":
            raise ValueError("this predictor gives numbers, which have no probabilities; use predict")
        return self._by_column(sequences, self.targets.probabilities, options)

    def _by_column(self, sequences, of_outputs, options: dict):
        names = [column.name for column in self.targets.columns]
        found = {name: [] for name in ([self.targets.name] if self.targets.separator else names)}
        for _, values in self._stream(sequences, of_outputs, **options):
            for name, column in zip(found, values, strict=True):
                found[name].append(column if self.per_residue else column[0])
        return found if len(found) > 1 else next(iter(found.values()))

    def _stream(self, sequences, of_outputs, batch_tokens=None, **policy) -> Iterator:
        chosen = Policy(**policy)
        chosen = Policy(**policy, max_residues=self.esm.config.limit(chosen.overlength))
        if self.pairs:
            yield from self._stream_of_pairs(sequences, of_outputs, batch_tokens, chosen)
            return
        tokens = (tokenize(records, chosen, Report()) for records in records_from(sequences))
        for label, (array,) in self.outputs(tokens, batch_tokens=batch_tokens, window=chosen.window):
            yield label, of_outputs(array)

    def _stream_of_pairs(self, sequences, of_outputs, batch_tokens, policy: Policy) -> Iterator:
        sequences = list(sequences)
        for number, pair in enumerate(sequences):
            if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise TypeError(f"pair {number} is {pair!r:.80}: a predictor of pairs takes two strings for each")
        number = {text: at for at, text in enumerate(dict.fromkeys(text for pair in sequences for text in pair))}
        tokens = [tokenize(records, policy, Report()) for records in records_from(number)]
        kept = {int(at): place for place, at in enumerate(at for chunk in tokens for at in chunk.numbers)}
        index = [[kept.get(number[text], -1) for text in pair] for pair in sequences]
        index = np.array([pair for pair in index if min(pair) >= 0], dtype=np.int64).reshape(-1, 2)
        options = {"batch_tokens": batch_tokens, "window": policy.window}
        for array in self.outputs_of_pairs(tokens, index, **options):
            yield None, of_outputs(array)

    def save(self, folder: str | Path, about: dict | None = None, *, base: "Base | None" = None) -> None:
        """Writes the model, which `esm_fast.load` and `esm-fast embed` read, the head, and what it means.

        base: write what was trained on it in the place of the model, and which model that was.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if base is None:
            weights.save(self.esm, folder / _MODEL)
            (folder / _ADAPTERS).unlink(missing_ok=True)
        else:
            factors = {name: tensor.cpu().contiguous() for name, tensor in self.adapters.items()}
            with atomic(folder / _ADAPTERS, durable=False) as temporary:
                save_file(factors, temporary)
            (folder / _MODEL).unlink(missing_ok=True)
            about = (about or {}) | {"base": base.name, "base_checksum": base.checksum}
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()}
        with atomic(folder / _HEAD, durable=False) as temporary:
            save_file(head, temporary)
        said = {"targets": asdict(self.targets), "layer": self.layer, "head": self.head.kind, "pairs": self.pairs}
        said |= about or {}
        with atomic(folder / _ABOUT, durable=False) as temporary:
            temporary.write_text(json.dumps(said, indent=1) + "\n")


class Base(NamedTuple):
    """The model on which a predictor was trained. name: as for `esm_fast.load`; checksum: of its tensors."""

    name: str
    checksum: str


def base_of(name: str) -> Base:
    """A base that `load_predictor` will find by this name, a path in full. Raises what `esm_fast.load` does."""
    path = Path(name).expanduser()
    known = name.startswith("random:") or hub.canonical_name(name) in hub.published_names()
    checkpoint = _checkpoint(name)
    return Base(name if known else str(path.absolute()), _checksum(checkpoint.tensors))


def _checkpoint(name: str) -> weights.Checkpoint:
    if not name.startswith("random:"):
        return weights.read(hub.resolve(name)).unpacked()
    model = random_model(name)
    return weights.Checkpoint(Path(name), "esm_fast", model.config, dict(model.state_dict()))


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Of all but the contact regression, in whatever layout the tensors lie."""
    return weights.checksum(
        {
            key: tensor.detach().contiguous()
            for key, tensor in tensors.items()
            if key not in weights.CONTACT_KEYS and key != "lm_head.weight"
        }
    )


def model_of(folder: str | Path) -> Path | str:
    """The file of a predictor's model, or the name of its base."""
    folder = Path(folder)
    if (folder / _MODEL).exists():
        return folder / _MODEL
    about = _about(folder)
    return about["base"] if _is_alone(folder, about) else folder / _MODEL


def _about(folder: Path) -> dict:
    """finetune.json. Raises PredictorError."""
    if not (folder / _ABOUT).is_file():
        raise PredictorError(f"{folder} holds no predictor: there is no {_ABOUT}; give a folder of esm-fast finetune")
    try:
        about = json.loads((folder / _ABOUT).read_text())
        if not isinstance(about, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, OSError, RecursionError) as error:
        raise PredictorError(f"{folder} holds a damaged predictor: {_ABOUT}: {error}") from None
    return about


def _is_alone(folder: Path, about: dict) -> bool:
    """Whether it was saved without its model; what has lost it was not."""
    return "base_checksum" in about and not (folder / _MODEL).exists()


def _whole(folder: Path, about: dict, base: str | None) -> weights.Checkpoint:
    """The model of a predictor that was saved without it: its base with the adapters added."""
    name = base or about["base"]
    checkpoint = _checkpoint(name)
    if _checksum(checkpoint.tensors) != about["base_checksum"]:
        raise PredictorError(f"{folder} was trained on another model than {name}: its checksum differs; give that one")
    try:
        tensors = adapters.merged(checkpoint.tensors, load_file(folder / _ADAPTERS))
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise PredictorError(f"{folder / _ADAPTERS} is damaged: {error}") from None
    return replace(checkpoint, tensors=tensors)


def written(folder: str | Path) -> list[Path]:
    """The files that `Predictor.save` would replace there. Raises OSError where it could write none."""
    folder = Path(folder)
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {folder.parent} does not exist; make it first")
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder for the predictor")
    if not os.access(folder if folder.is_dir() else folder.absolute().parent, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to")
    return [folder / name for name in (_MODEL, _ADAPTERS, _HEAD, _ABOUT) if os.path.lexists(folder / name)]


def load_predictor(
    folder: str | Path,
    *,
    base: str | None = None,
    load_model: Callable[[Path | weights.Checkpoint], Encoder] | None = None,
    **options,
) -> Predictor:
    """What `finetune` or `Predictor.save` wrote. `save` of it writes the whole model, adapters merged.

    Args:
        options: as for `esm_fast.load` (device, dtype, backend, packed); by default in fp32 on the CPU.
        base: where the model now is on which a predictor without one was trained.
        load_model: in the place of `esm_fast.load`.

    Raises PredictorError, OSError, and what `load` does.
    """
    folder = Path(folder)
    about = _about(folder)
    try:
        targets = Targets.from_json(about["targets"])
        if (kind := about.get("head", "linear")) not in heads.KINDS:
            raise ValueError(f"its head is {kind!r}, known are {', '.join(heads.KINDS)}")
        if (paired := about.get("pairs", "")) not in ("", *KINDS):
            raise ValueError(f"its pairs are {paired!r}, known are {', '.join(KINDS)}")
        head = load_file(folder / _HEAD)
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise PredictorError(f"{folder} holds a damaged predictor: {error}") from None
    model = _whole(folder, about, base) if _is_alone(folder, about) else folder / _MODEL
    esm = load_model(model) if load_model else load(model, **{"device": "cpu"} | options)[0]
    hidden = len(head["inner.bias"]) if "inner.bias" in head else 0
    predictor = Predictor(esm, targets, about.get("layer"), head=kind, hidden=hidden, pairs=paired)
    if {name: tensor.shape for name, tensor in head.items()} != {
        name: tensor.shape for name, tensor in predictor.head.state_dict().items()
    }:
        raise PredictorError(f"{folder}: the head fits neither the model nor the labels; train it again")
    predictor.head.load_state_dict(head)
    return predictor.eval()


def _residue_share(batch: PackedBatch) -> torch.Tensor:
    """(n,): 1 / residues on each residue, 0 on <cls> and <eos>."""
    lengths = batch.lengths
    share = torch.repeat_interleave(1.0 / (lengths - 2).clamp(min=1), lengths)
    ends = batch.cu_seqlens.long()
    share[ends[:-1]] = 0
    share[ends[1:] - 1] = 0
    return share
