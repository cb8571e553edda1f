"""A model from a checkpoint, each tensor checked."""

import math
import warnings
from pathlib import Path

import torch

from ..memory import MappedFiles, without_values
from ..models.encoder import Encoder
from ..models.family import of_config
from ..packed import PackedWeight
from .checkpoint import CONTACT_KEYS, Checkpoint, CheckpointError


def build(
    checkpoint: Checkpoint, model_class: type[Encoder] | None = None, *, dtype=torch.float32, backend=None
) -> Encoder:
    """A model holding a checkpoint's tensors: the very same memory where dtype needs no conversion.

    model_class: of the checkpoint's family; None for the one that knows packed batches only.
    A missing, extra, mis-shaped or non-finite tensor is a CheckpointError naming it. Without contact regression or
    language-model head the model loads, with a warning unless we wrote the file, and says so when these are asked for.
    """
    with without_values():
        model_class = model_class or of_config(checkpoint.config).model
        model = model_class(checkpoint.config, backend=backend).requires_grad_(not checkpoint.packed)
    tensors = dict(checkpoint.tensors)
    if not any(key.startswith("lm_head.") for key in tensors):
        warnings.warn(f"{checkpoint.source} has no language-model head: logits are not available", stacklevel=2)
        model.lm_head = None
    _tie(checkpoint.source, model.tied(), tensors)
    if not CONTACT_KEYS & set(tensors):
        if checkpoint.kind != "esm_fast":  # one that we wrote lacks it because its original did
            warnings.warn(f"{checkpoint.source} has no contact regression: contacts are not available", stacklevel=2)
        tensors |= {key: torch.zeros_like(model.get_parameter(key), device="cpu") for key in CONTACT_KEYS}
    expected = {key: parameter.shape for key, parameter in model.state_dict().items()}
    _check_tensors(checkpoint.source, tensors, expected)
    model.load_state_dict(_converted(checkpoint.source, tensors, dtype), assign=True)
    if model.lm_head is not None:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def _tie(source: Path, tied: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """Makes the tensors that a model holds twice one, whether a file has them once or twice."""
    for key, of in tied.items():
        if of in tensors:
            if key in tensors and not torch.equal(tensors[key], tensors[of]):
                raise CheckpointError(f"{source}: {key} differs from {of}; in this model they are one")
            tensors[key] = tensors[of]


def _check_tensors(source: Path, tensors: dict[str, torch.Tensor], expected: dict[str, torch.Size]) -> None:
    problems = [f"missing {key}" for key in sorted(set(expected) - set(tensors))]
    problems += [f"unexpected {key}" for key in sorted(set(tensors) - set(expected))]
    for key in sorted(set(expected) & set(tensors)):
        tensor = tensors[key]
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            problems.append(f"{key} is no floating-point tensor")
        elif tensor.shape != expected[key]:
            problems.append(f"{key} has shape {tuple(tensor.shape)}, expected {tuple(expected[key])}")
    _raise(source, problems)


def _converted(source: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors in dtype, each checked to be finite, in little more memory than the result takes.

    Packed ones were checked when they were packed, and keep their type.
    """
    mapped, problems, converted = MappedFiles(), [], {}
    for key, tensor in tensors.items():
        if isinstance(tensor, PackedWeight):
            converted[key] = tensor
            continue
        if not all(math.isfinite(bound) for bound in tensor.aminmax()):  # NaN propagates; no copy is made
            problems.append(f"{key} holds NaN or infinity")
        converted[key] = tensor.to(dtype)
        if converted[key] is not tensor:
            mapped.forget(tensor)
    _raise(source, problems)
    return converted


def _raise(source: Path, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(f"{source} does not fit its configuration: {'; '.join(problems[:10])}{more}")
