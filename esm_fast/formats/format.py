"""What a format says of itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .weight import PrepackedWeight


def _runs_anywhere(device: str, backend: str | None, packed) -> None:
    """Where nothing is to be refused before a model is read."""


def _as_they_are(model, original) -> Callable[..., dict[str, torch.Tensor]]:
    """No factors for any layer."""
    return lambda layer: {}


@dataclass(frozen=True)
class Format:
    """name: of `_C`, of files, and of `load`'s and the commands' dtype. dtype: as `load` and checkpoints say it;
    around: of the model's other tensors. weight: what stands in a matrix's place.

    require(device, backend, packed) raises ValueError, before anything is read, where `load` could not run the model.
    smoothing(model, original) -> what is called with each of its layers in turn, before that is prepacked. It may
    change norms and biases, and returns for names of `MATRICES` a factor per input, by which the matrix is multiplied.
    original: gives the `Original` of a linear layer's matrix.
    """

    name: str
    dtype: torch.dtype
    around: torch.dtype
    weight: type[PrepackedWeight]
    require: Callable[[str, str | None, object], None] = _runs_anywhere
    smoothing: Callable[..., Callable[..., dict[str, torch.Tensor]]] = _as_they_are

    @property
    def quantised(self) -> bool:
        """Whether it is no type of torch's that a model could have throughout."""
        return self.dtype != self.around
