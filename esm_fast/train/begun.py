"""A fine-tuning that was begun: all that it needs to resume bit for bit, in one file, whole or not there."""

import json
import time
from collections.abc import Sized
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import weights
from ..files.atomic import atomic
from ..files.checksums import digest_of

NAME = "training.safetensors"
_SECONDS = 600.0  # of work that a kill may cost


class BegunError(ValueError):
    """What was begun is of another training, or damaged; the message names the file."""


@dataclass
class Begun:
    """path: the file. identity: what the training is of, for JSON. asked: not empty once it is to stop and save.

    writes: whether this process writes it; the others read.
    """

    path: Path
    identity: dict
    asked: Sized = ()
    writes: bool = True
    seconds: float = _SECONDS
    _last: float = field(default_factory=time.monotonic, init=False)

    def load(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """(tensors, state) as they were saved last; None where nothing was begun. Raises BegunError."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state, checksum = about["state"], about["checksum"]
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise BegunError(f"{self.path} is damaged: {error}; begin again with --force") from None
        if about["identity"] != self.identity:
            known = about["identity"]
            other = [name for name, value in self.identity.items() if known.get(name) != value]
            raise BegunError(
                f"{self.path} is of another training: {', '.join(other)} differ; "
                "choose another output, or begin again with --force"
            )
        if _checksum(tensors, state) != checksum:
            raise BegunError(f"{self.path} is damaged: it does not match its checksum; begin again with --force")
        return tensors, state

    @property
    def due(self) -> bool:
        return bool(len(self.asked)) or time.monotonic() - self._last > self.seconds

    def save(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        if self.writes:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            about = {"identity": self.identity, "state": state, "checksum": _checksum(tensors, state)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(self.path) as temporary:
                save_file(tensors, temporary, {"about": json.dumps(about)})
        self._last = time.monotonic()

    def remove(self) -> None:
        if self.writes:
            self.path.unlink(missing_ok=True)


def _checksum(tensors: dict[str, torch.Tensor], state: dict) -> str:
    return digest_of([weights.checksum(tensors), state])
