"""What every reader of weights returns: a model's tensors in canonical keys, and where they are from."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..formats import formats
from ..formats.weight import PrepackedWeight, plain
from ..models.family import Config

CONTACT_KEYS = {"contact_head.regression.weight", "contact_head.regression.bias"}


class CheckpointError(ValueError):
    """A checkpoint that is damaged, unsafe, incomplete or of another family; the message names file and key."""


def shown(name: object) -> str:
    """A name out of a file, for a message: what a terminal would take as a command is escaped."""
    text = str(name)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:200]}..."


def raise_problems(source: Path, problems: list[str]) -> None:
    """CheckpointError of the first ten, if there are any."""
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(f"{source} does not fit its configuration: {'; '.join(problems[:10])}{more}")


@dataclass
class Checkpoint:
    """A checkpoint in fair-esm's canonical keys. kind: "fair-esm", "transformers" or "esm_fast".

    sha256: what our own file says of itself.
    """

    source: Path
    kind: str
    config: Config
    tensors: dict[str, torch.Tensor]
    sha256: str | None = None

    @property
    def packed(self) -> bool:
        """Whether it holds matrices as `esm-fast convert --pack` stores them."""
        return any(isinstance(tensor, PrepackedWeight) for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """As `load` takes it: that of the format of its matrices, such as int8, where they are prepacked."""
        for tensor in self.tensors.values():
            if isinstance(tensor, PrepackedWeight):
                return formats()[tensor.weights.dtype].dtype
        return self.tensors["embed_tokens.weight"].dtype

    def unpacked(self) -> "Checkpoint":
        """With plain matrices only, for training and for anything but the CPU kernels."""
        return replace(self, tensors={key: plain(tensor) for key, tensor in self.tensors.items()})
