"""A predictor: a model with a linear head, as `finetune` makes it; it is saved, loaded, and predicts."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .. import ops, weights
from ..files.atomic import atomic
from ..inference.embed import token_budget
from ..inference.load import load
from ..inference.outputs import Output
from ..inference.outputs.prediction import OfProtein, OfResidues
from ..inference.stream import Protein, run
from ..models.encoder import Encoder
from ..sequences.batching import PackedBatch
from ..sequences.fasta import records_from
from ..sequences.tokenize import Policy, Report, Tokens, tokenize
from .targets import Targets

_MODEL, _HEAD, _ABOUT = "model.safetensors", "head.safetensors", "finetune.json"


class PredictorError(ValueError):
    """A folder that holds no predictor, or a damaged one; the message names it."""


class Predictor(nn.Module):
    """A model and its head on one of its layers. `targets` says what the head's outputs mean."""

    def __init__(self, esm: Encoder, targets: Targets, layer: int | None = None):
        super().__init__()
        self.esm, self.targets = esm, targets
        self.layer = esm.config.layers if layer is None else layer
        self.head = nn.Linear(esm.config.embed_dim, targets.outputs, device=esm.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def per_residue(self) -> bool:
        return self.targets.level == "residue"

    def set_head(self, weight: np.ndarray, bias: np.ndarray) -> None:
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(weight))
            self.head.bias.copy_(torch.from_numpy(bias))

    def features(self, batch: PackedBatch, representation: torch.Tensor) -> torch.Tensor:
        """(sequences, width), the mean over each one's residues, or (all residues, width); with gradients.

        representation: (tokens, width), the layer's.
        """
        share = _residue_share(batch)
        if self.per_residue:
            return representation[share > 0]
        return ops.pool(representation, batch.cu_seqlens, share, backend=self.esm.backend)

    def output(self) -> Output:
        """What the stream makes of each protein: the head's outputs, (outputs,) or (residues, outputs)."""
        weight, bias = (t.detach().float().cpu() for t in (self.head.weight, self.head.bias))
        if self.per_residue:
            return OfResidues(self.layer, weight=weight, bias=bias)
        return OfProtein(self.layer, weight=weight.numpy(), bias=bias.numpy())

    def outputs(self, tokens: Iterable[Tokens], *, batch_tokens=None, window=None, on_batch=lambda n: None):
        """Streams proteins through model and head, in input order: `stream.Protein`s of one array, outputs of the head:
        at the level of sequences (1, outputs), else (residues, outputs)."""
        budget = token_budget(self.esm, batch_tokens)
        for label, (array,) in run(self.esm, tokens, [self.output()], budget, on_batch, window):
            yield Protein(label, [array if self.per_residue else array[None]])

    def predict(self, sequences: Sequence, **options) -> list | dict[str, list]:
        """For each sequence its class or number; at the residue level a list of them.

        Of several columns of labels, {column: such a list}.

        Args:
            sequences: strings, or (label, string) pairs.
            options: batch_tokens; unknown, empty ("error", "x" ...) and overlength ("error", "truncate", "window"), as
                for `esm_fast.embed`.

        Raises FastaError for letters or lengths that the model does not take.
        """
        return self._by_column(sequences, self.targets.labels, options)

    def predict_proba(self, sequences: Sequence, **options) -> list | dict[str, list]:
        """For each sequence the probability of each of the target's `classes`, (classes,); at the residue level
        (residues, classes). Of several columns, {column: such a list}. Takes what `predict` does.

        Raises ValueError where the predictor gives numbers, not classes.
        """
        if self.targets.task != "classification":
            raise ValueError("this predictor gives numbers, which have no probabilities; use predict")
        return self._by_column(sequences, self.targets.numbers, options)

    def _by_column(self, sequences, of_outputs, options: dict):
        found = {column.name: [] for column in self.targets.columns}
        for _, values in self._stream(sequences, of_outputs, **options):
            for name, column in zip(found, values, strict=True):
                found[name].append(column if self.per_residue else column[0])
        return found if len(found) > 1 else next(iter(found.values()))

    def _stream(self, sequences, of_outputs, batch_tokens=None, **policy) -> Iterator:
        chosen = Policy(**policy)
        chosen = Policy(**policy, max_residues=self.esm.config.limit(chosen.overlength))
        tokens = (tokenize(records, chosen, Report()) for records in records_from(sequences))
        for label, (array,) in self.outputs(tokens, batch_tokens=batch_tokens, window=chosen.window):
            yield label, of_outputs(array)

    def save(self, folder: str | Path, about: dict | None = None) -> None:
        """Writes the model, which `esm_fast.load` and `esm-fast embed` read, the head, and what it means."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights.save(self.esm, folder / _MODEL)
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()}
        with atomic(folder / _HEAD, durable=False) as temporary:
            save_file(head, temporary)
        said = {"targets": asdict(self.targets), "layer": self.layer} | (about or {})
        with atomic(folder / _ABOUT, durable=False) as temporary:
            temporary.write_text(json.dumps(said, indent=1) + "\n")


def written(folder: str | Path) -> list[Path]:
    """The files that `Predictor.save` would replace there. Raises OSError where it could write none."""
    folder = Path(folder)
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {folder.parent} does not exist; make it first")
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder for the predictor")
    if not os.access(folder if folder.is_dir() else folder.absolute().parent, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to")
    return [folder / name for name in (_MODEL, _HEAD, _ABOUT) if os.path.lexists(folder / name)]


def load_predictor(folder: str | Path, *, load_model: Callable[[Path], Encoder] | None = None, **options) -> Predictor:
    """What `finetune` or `Predictor.save` wrote.

    Args:
        options: as for `esm_fast.load` (device, dtype, backend, packed); by default in fp32 on the CPU.
        load_model: in the place of `esm_fast.load`.

    Raises PredictorError, OSError, and what `load` does.
    """
    folder = Path(folder)
    if not (folder / _ABOUT).is_file():
        raise PredictorError(f"{folder} holds no predictor: there is no {_ABOUT}; give a folder of esm-fast finetune")
    try:
        about = json.loads((folder / _ABOUT).read_text())
        targets = Targets.from_json(about["targets"])
        head = load_file(folder / _HEAD)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise PredictorError(f"{folder} holds a damaged predictor: {error}") from None
    esm = load_model(folder / _MODEL) if load_model else load(folder / _MODEL, **{"device": "cpu"} | options)[0]
    predictor = Predictor(esm, targets, about.get("layer"))
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
