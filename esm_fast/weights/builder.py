"""A model from a checkpoint, each tensor checked."""

import math
import re
import warnings
from pathlib import Path

import torch

from ..formats.weight import PrepackedWeight
from ..memory import MappedFiles, without_values
from ..models.encoder import Encoder
from ..models.family import of_config
from .checkpoint import CONTACT_KEYS, Checkpoint, CheckpointError, raise_problems, shown
from .safe import require_dense


def build(
    checkpoint: Checkpoint, model_class: type[Encoder] | None = None, *, dtype=torch.float32, backend=None
) -> Encoder:
    """A model holding a checkpoint's tensors: the very same memory where dtype needs no conversion.

    model_class: of the checkpoint's family; None for the one that knows packed batches only.
    A missing, extra, mis-shaped or non-finite tensor is a CheckpointError naming it. Without contact regression or
    language-model head the model loads, with a warning unless we wrote the file, and says so when these are asked for.
    """
    tensors = dict(checkpoint.tensors)
    require_dense(checkpoint.source, {key: t for key, t in tensors.items() if not isinstance(t, PrepackedWeight)})
    _check_depth(checkpoint)
    with without_values():
        model_class = model_class or of_config(checkpoint.config).model
        model = model_class(checkpoint.config, backend=backend).requires_grad_(not checkpoint.packed)
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
    fixed = {key for key, _ in model.named_buffers(remove_duplicate=False)}  # fp32 in a model of any dtype
    converted = _converted(checkpoint.source, tensors, dtype, fixed)
    model.load_state_dict(_apart(converted, model.tied()), assign=True)
    if model.lm_head is not None:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def _check_depth(checkpoint: Checkpoint) -> None:
    """The model is not made before this: a damaged number of layers would take hours and all memory."""
    found = {int(number[1]) for key in checkpoint.tensors if (number := re.match(r"layers\.(\d{1,9})\.", key))}
    if checkpoint.config.layers > len(found):
        raise CheckpointError(
            f"{checkpoint.source} does not fit its configuration, which says {checkpoint.config.layers:,} layers: "
            f"there are tensors of {len(found):,}"
        )


def _tie(source: Path, tied: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """Makes the tensors that a model holds twice one, whether a file has them once or twice."""
    for key, of in tied.items():
        if of in tensors:
            if key in tensors and not torch.equal(tensors[key], tensors[of]):
                raise CheckpointError(f"{source}: {key} differs from {of}; in this model they are one")
            tensors[key] = tensors[of]


def _check_tensors(source: Path, tensors: dict[str, torch.Tensor], expected: dict[str, torch.Size]) -> None:
    problems = [f"missing {key}" for key in sorted(set(expected) - set(tensors))]
    problems += [f"unexpected {shown(key)}" for key in sorted(set(tensors) - set(expected))]
    for key in sorted(set(expected) & set(tensors)):
        tensor = tensors[key]
        if tensor.shape != expected[key]:
            problems.append(f"{key} has shape {tuple(tensor.shape)}, expected {tuple(expected[key])}")
    raise_problems(source, problems)


def _converted(source: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, fixed: set[str]):
    """The tensors in dtype, those of `fixed` in fp32, each checked to be finite; in little more memory than they take.

    Packed ones were checked when they were packed, and keep their type.
    """
    mapped, problems, converted = MappedFiles(), [], {}
    for key, tensor in tensors.items():
        if isinstance(tensor, PrepackedWeight):
            converted[key] = tensor
            continue
        if not all(math.isfinite(bound) for bound in tensor.aminmax()):  # NaN propagates; no copy is made
            problems.append(f"{key} holds NaN or infinity")
        converted[key] = tensor.to(torch.float32 if key in fixed else dtype).resolve_neg().contiguous()
        if converted[key] is not tensor:
            mapped.forget(tensor)
    raise_problems(source, problems)
    return converted


def _apart(tensors: dict[str, torch.Tensor], tied: dict[str, str]) -> dict[str, torch.Tensor]:
    """With a copy of each tensor that shares memory with another, as a file may have it: training would change both."""
    ordinary = [key for key, t in tensors.items() if not isinstance(t, PrepackedWeight) and key not in tied]
    end = 0
    for key in sorted(ordinary, key=lambda key: tensors[key].data_ptr()):
        tensor = tensors[key]
        if tensor.data_ptr() < end:
            tensors[key] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return tensors
