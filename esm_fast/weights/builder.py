"""A model from a checkpoint, each tensor checked."""

import math
import re
import warnings
from bisect import bisect
from collections.abc import Callable
from pathlib import Path

import torch

from ..formats.model import Prepacking
from ..formats.weight import MATRICES, PrepackedWeight
from ..memory import MappedFiles, without_values
from ..models.encoder import Encoder
from ..models.family import of_config
from .checkpoint import CONTACT_KEYS, Checkpoint, CheckpointError, raise_problems, shown
from .safe import require_dense

_AT_ONCE = 1 << 20  # elements that are converted together


class NoRegressionWarning(UserWarning):
    """A model that cannot tell contacts was loaded."""


def build(
    checkpoint: Checkpoint,
    model_class: type[Encoder] | None = None,
    *,
    dtype=torch.float32,
    backend=None,
    prepack: Prepacking | None = None,
    after: Callable[[], None] = lambda: None,
) -> Encoder:
    """A model holding a checkpoint's tensors: the very same memory where dtype needs no conversion.

    Tensors are read, converted and let go one by one, a layer after the other, so that loading takes little more memory
    than what is kept.

    Args:
        model_class: of the checkpoint's family; None for the one that knows packed batches only.
        prepack: is given the model and each layer in turn, as soon as that holds its tensors and before the next one
            is read; what it puts in their place is what is kept. It gets matrices as they lie in the file.
        after: is called after each layer.

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
            text = f"{checkpoint.source} has no contact regression: contacts are not available"
            warnings.warn(text, NoRegressionWarning, stacklevel=2)
        tensors |= {key: torch.zeros_like(model.get_parameter(key), device="cpu") for key in CONTACT_KEYS}
    expected = {key: parameter.shape for key, parameter in model.state_dict().items()}
    _check_tensors(checkpoint.source, tensors, expected)
    _fill(model, checkpoint.source, tensors, dtype, prepack, after)
    return model


def _fill(model: Encoder, source: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, prepack, after) -> None:
    """Puts the tensors into a model without values, those outside the layers first. Raises CheckpointError."""
    fixed = {key for key, _ in model.named_buffers(remove_duplicate=False)}  # fp32 in a model of any dtype
    groups: dict[str, list[str]] = {"": []} | {f"layers.{number}.": [] for number in range(len(model.layers))}
    for key in tensors:
        groups[".".join(key.split(".")[:2]) + "." if key.startswith("layers.") else ""].append(key)
    convert = _Conversion(dtype, fixed, model.tied())
    as_read: tuple[str, ...] = ()
    for prefix, keys in groups.items():
        converted = {}
        for key in keys:
            name = key.removeprefix(prefix)
            converted[name] = convert(key, tensors[key], name in as_read)
        part = model.get_submodule(prefix.removesuffix("."))
        part.load_state_dict(converted, assign=True, strict=bool(prefix))
        del converted  # or it would keep what prepacking drops
        if not prefix and model.lm_head is not None:
            model.lm_head.weight = model.embed_tokens.weight
        if prepack is not None and not convert.problems:
            if prefix:
                prepack(model, part)
            elif prepack.takes(model):
                as_read = tuple(f"{name}.weight" for name in MATRICES)
        if prefix:
            after()
    raise_problems(source, convert.problems)


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


class _Conversion:
    """Tensors of a checkpoint one by one in dtype, those of `fixed` in fp32; in little more memory than they take.

    problems: those that are not finite. Prepacked ones were checked when they were prepacked, and keep their type.
    tied: of what a model holds once under several names, all names but one.
    """

    def __init__(self, dtype: torch.dtype, fixed: set[str], tied: dict[str, str]):
        self.dtype, self.fixed, self.tied = dtype, fixed, tied
        self.mapped, self.problems = MappedFiles(), []
        self.starts: list[int] = []  # of the checkpoint's own memory that the model has so far, ascending, with ends
        self.ends: list[int] = []

    def __call__(self, key: str, tensor: torch.Tensor, as_read: bool = False) -> torch.Tensor:
        """as_read: whether it is only looked at."""
        if isinstance(tensor, PrepackedWeight):
            return tensor
        dtype = torch.float32 if key in self.fixed else self.dtype
        plain = tensor.dtype == dtype and tensor.is_contiguous() and not tensor.is_neg()
        made = None if as_read or plain else torch.empty(tensor.shape, dtype=dtype)
        self._pass(key, tensor, dtype, made, let_go=not plain or as_read)
        if as_read:
            return tensor.resolve_neg()
        if made is not None:
            return made
        return tensor if key in self.tied and key not in self.fixed else self._apart(tensor)

    def _pass(
        self, key: str, tensor: torch.Tensor, dtype: torch.dtype, into: torch.Tensor | None, let_go: bool
    ) -> None:
        """Some rows at a time: looks whether they are finite, converts them, and lets the file's pages go."""
        parts = tensor.split(max(1, _AT_ONCE * len(tensor) // max(1, tensor.numel()))) if tensor.ndim else [tensor]
        first, bounds = 0, []
        for part in parts:
            bounds += part.aminmax() if part.numel() else ()
            if into is not None:
                (into[first : first + len(part)] if tensor.ndim else into).copy_(part)
            first += len(part) if tensor.ndim else 0
            if let_go and tensor.is_contiguous():  # from the start: pages that were let go come back with the next ones
                self.mapped.forget(tensor[:first] if tensor.ndim else tensor)
        if not all(math.isfinite(bound) for bound in bounds):  # NaN propagates
            self.problems.append(f"{key} holds NaN or infinity")
        elif not all(math.isfinite(bound.to(dtype)) for bound in bounds):
            name = str(dtype).removeprefix("torch.")
            self.problems.append(f"{key} holds numbers too large for {name}; choose bfloat16 or float32")

    def _apart(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy if it shares memory with an earlier one, as a file may have it: training would change both."""
        start = tensor.data_ptr()
        end = start + tensor.nbytes
        at = bisect(self.starts, start)
        if (at and self.ends[at - 1] > start) or (at < len(self.starts) and self.starts[at] < end):
            return tensor.clone()
        self.starts.insert(at, start)
        self.ends.insert(at, end)
        return tensor
