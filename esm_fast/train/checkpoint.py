"""Checkpoints: parameters, Adam's moments and the run's numbers in one safetensors file, whole or not there at all.

A checkpoint does not depend on the number of processes that wrote it, nor on how they shared the optimiser.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..weights import checksum
from ..writers.files import atomic

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADVICE = "delete it to go on from the one before"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or of another run; the message names it."""


@dataclass(frozen=True)
class Saved:
    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict


def save(folder: Path, step: int, parameters: dict, optimizer_state: dict, state: dict, keep: int) -> Path:
    """Writes folder/step_N.safetensors and removes all but the newest `keep`.

    parameters: by name, in the optimiser's order; optimizer_state: the "state" of its state_dict, by number.
    """
    tensors = {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    for number, name in enumerate(parameters):
        for moment in _MOMENTS if number in optimizer_state else ():
            tensors[f"{moment}.{name}"] = optimizer_state[number][moment].cpu().contiguous()
    metadata = {"format": "esm_fast training", "version": "1", "state": json.dumps(state), "sha256": checksum(tensors)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09d}.safetensors"
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata)
    for old in paths(folder)[:-keep]:
        old.unlink()
    return path


def remove_partial(folder: Path) -> None:
    """Removes what a process that was killed while it wrote has left, by our hand or by safetensors' own."""
    for pattern in (".*.partial", ".tmp??????"):
        for leftover in folder.glob(pattern):
            leftover.unlink()


def paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step_*.safetensors"))


def newest(folder: Path) -> Saved | None:
    """Reads and verifies the newest checkpoint; None where there is none. Raises CheckpointError."""
    found = paths(folder)
    if not found:
        return None
    path = found[-1]
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_ADVICE}") from None
    if metadata.get("sha256") != checksum(tensors):
        raise CheckpointError(f"{path} is damaged: it does not match its checksum; {_ADVICE}")
    return Saved(path, tensors, json.loads(metadata["state"]))


def restore(saved: Saved, parameters: dict[str, torch.nn.Parameter], optimizer, updates: int) -> None:
    """Puts a checkpoint's numbers into the parameters and the optimiser."""
    expected = {f"model.{name}": parameter.shape for name, parameter in parameters.items()}
    held = {key: tensor.shape for key, tensor in saved.tensors.items() if key.startswith("model.")}
    if held != expected:
        raise CheckpointError(f"{saved.path} holds another model; choose another output folder")
    state = {}
    with torch.no_grad():
        for number, (name, parameter) in enumerate(parameters.items()):
            parameter.copy_(saved.tensors[f"model.{name}"])
            if f"exp_avg.{name}" in saved.tensors:
                moments = {moment: saved.tensors[f"{moment}.{name}"].clone() for moment in _MOMENTS}
                state[number] = {"step": torch.tensor(float(updates)), **moments}
    groups = [{**optimizer.param_groups[0], "params": list(range(len(parameters)))}]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
