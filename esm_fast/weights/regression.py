"""Contact regressions as files of their own: fair-esm's beside its models, and those of `esm-fast fit-contacts`."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..files.atomic import atomic
from ..files.fair_esm_pt import save as save_pt
from ..models.family import REGRESSION
from .checkpoint import CONTACT_KEYS, Checkpoint, CheckpointError
from .native import metadata_of
from .safe import kind_of, parsed_json, read_tensors, require_tensors

FORMAT = "esm_fast contact regression"
_MARK = "model.embedding"  # the embedding of one residue, by which a regression knows the model that it was fitted to
_RESIDUE = 4  # L, the first of the alphabet's residues
_APART = 0.2  # fine-tuning moves embeddings by far less than this, relative to their norm; another model has its own


def beside(path: Path) -> Path | None:
    """The regression that lies beside a checkpoint: NAME-contact-regression.safetensors or .pt, as fair-esm calls it;
    in the folder of a Hugging Face model contact-regression.safetensors."""
    stem = path / REGRESSION[1:].removesuffix(".pt") if path.is_dir() else path.with_name(path.stem + REGRESSION[:-3])
    found = [stem.with_name(stem.name + ending) for ending in (".safetensors", ".pt")]
    return next((file for file in found if file.exists()), None)


def attach(checkpoint: Checkpoint, file: Path) -> Checkpoint:
    """The checkpoint with the regression of a file in the place of its own, if it has one.

    Raises CheckpointError for what is no regression, or one that was fitted to another model.
    """
    content = read_tensors(file)
    if kind_of(file) == "safetensors":
        mark = content.pop(_MARK, None)
        if mark is None or metadata_of(file).get("format") != FORMAT:
            raise CheckpointError(f"{file} is no contact regression of esm-fast fit-contacts")
        _require_same_model(checkpoint, file, mark)
    else:
        content = content.get("model") if isinstance(content, dict) else None
    if not isinstance(content, dict) or set(content) != CONTACT_KEYS:
        raise CheckpointError(f"{file} is no contact regression: expected 'model' with {sorted(CONTACT_KEYS)}")
    return replace(checkpoint, tensors=checkpoint.tensors | require_tensors(file, content))


def _require_same_model(checkpoint: Checkpoint, file: Path, mark: torch.Tensor) -> None:
    own = checkpoint.tensors.get("embed_tokens.weight")
    own = own[_RESIDUE].float() if own is not None and own.ndim == 2 and len(own) > _RESIDUE else None
    if own is None or own.shape != mark.shape or not (own - mark.float()).norm() <= _APART * mark.float().norm():
        raise CheckpointError(
            f"{file} was fitted to another model than {checkpoint.source}; fit one: esm-fast fit-contacts"
        )


def save(model, weight, bias: float, path: Path, worth: dict) -> None:
    """Writes coefficients, (maps,) of numpy, and bias. worth: what it was fitted on, and how good it was on others.

    A path that ends in .pt gets fair-esm's format, which neither the model nor the worth is part of.
    """
    keys = ("contact_head.regression.weight", "contact_head.regression.bias")
    found = (torch.as_tensor(weight).float().reshape(1, -1).contiguous(), torch.tensor([bias], dtype=torch.float32))
    tensors = dict(zip(keys, found, strict=True))
    with atomic(path) as temporary:
        if path.suffix == ".pt":
            save_pt({"model": tensors}, temporary)
            return
        mark = {_MARK: model.embed_tokens.weight[_RESIDUE].detach().float().cpu().clone()}
        save_file(tensors | mark, temporary, {"format": FORMAT, "worth": json.dumps(worth)})


def worth_of(file: Path) -> dict:
    """What `save` was told about a regression; {} for fair-esm's. Raises CheckpointError."""
    return parsed_json(metadata_of(file).get("worth", "{}"), file) if kind_of(file) == "safetensors" else {}
