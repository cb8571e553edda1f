"""Checkpoints by torch.distributed.checkpoint: folders of safetensors, whole and verified, or not there at all.

Every process writes and reads its share: parameters are divided, and Adam's moments written by whoever holds them. Any
number of processes reads what any other wrote, however they shared the optimiser.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.optim import ZeroRedundancyOptimizer

from ..files.atomic import sync
from ..files.checked_json import DamagedError, read_json, write_json
from ..files.checksums import sha256
from .processes import Processes

_MOMENTS = ("exp_avg", "exp_avg_sq")
_INFO = "checkpoint.json"  # the run's numbers, and the files' checksums and its own
_FILE_BYTES = 2**30  # a process holds a file in memory while it writes it
_ADVICE = "delete it to go on from the one before"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, of another run, or cannot be written; the message names it."""


@dataclass(frozen=True)
class Saved:
    path: Path
    state: dict


def save(folder: Path, step: int, parameters: dict, optimizer, state: dict, keep: int, processes: Processes) -> Path:
    """Writes the folder step_N and removes all but the newest `keep`. Every process calls it.

    parameters: by name; state: the run's numbers, for JSON.
    """
    path = folder / f"step_{step:09d}"
    partial = _partial(path)
    if processes.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.wait()
    writer = HuggingFaceStorageWriter(str(partial), _files(parameters), save_distributed=True)
    try:
        with _quiet():
            dcp.save(_tensors(parameters, optimizer), storage_writer=writer)
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be written: {_reason(error)}") from None
    mine = {file.name: sha256(file) for file in sorted(partial.glob(f"shard-{processes.rank + 1:05d}-*"))}
    files = {name: digest for part in processes.gather(mine) for name, digest in part.items()}
    if processes.first:
        write_json(partial / _INFO, {"format": "esm_fast training", "version": 2, "state": state, "files": files})
        partial.replace(path)
        sync(folder)
        for old in paths(folder)[:-keep]:
            shutil.rmtree(old.replace(_partial(old)))
    processes.wait()
    return path


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def remove_partial(folder: Path) -> None:
    """Removes what a process that was killed while it wrote has left, by our hand or by safetensors' own."""
    for pattern in (".*.partial", ".tmp??????"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning to a process that is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _tensors(parameters: dict, optimizer) -> dict[str, torch.Tensor]:
    """What this process has of a checkpoint, by name."""
    tensors, states = {f"model.{name}": tensor.detach() for name, tensor in parameters.items()}, _local(optimizer).state
    for name, parameter in parameters.items():
        for moment in _MOMENTS if parameter in states else ():
            tensors[f"{moment}.{name}"] = states[parameter][moment]
    return tensors


def _local(optimizer) -> torch.optim.Optimizer:
    """What updates this process's share of the parameters."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def _files(parameters: dict) -> dict[str, int]:
    """In which file of each process a tensor goes, from 1: all that a checkpoint can hold, a gigabyte a file."""
    numbers, size = {}, 0
    for prefix in ("model", *_MOMENTS):
        for name, parameter in parameters.items():
            numbers[f"{prefix}.{name}"] = 1 + size // _FILE_BYTES
            size += parameter.numel() * parameter.element_size()
    return numbers


def _reason(error: CheckpointException) -> str:
    return "; ".join(dict.fromkeys(str(failure) for failure, _ in error.failures.values()))


def paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step_*"))


def newest(folder: Path, processes: Processes) -> Saved | None:
    """Verifies the newest checkpoint, each process some of its files; None where there is none.

    Raises CheckpointError, in all processes where it does in one.
    """
    found = paths(folder)
    if not found:
        return None
    path = found[-1]
    try:
        info = read_json(path / _INFO)
    except (OSError, DamagedError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_ADVICE}") from None
    files = info["files"]
    mine = sorted(files)[processes.rank :: processes.world]
    problems = [problem for name in mine if (problem := _problem(path / name, files[name]))]
    if problems := sum(processes.gather(problems), []):
        raise CheckpointError(f"{path} is damaged: {', '.join(problems)}; {_ADVICE}")
    return Saved(path, info["state"])


def _problem(file: Path, digest: str) -> str | None:
    if not file.exists():
        return f"{file.name} is missing"
    return None if sha256(file) == digest else f"{file.name} does not match its checksum"


def restore(saved: Saved, parameters: dict, optimizer, updates: int) -> None:
    """Puts a checkpoint's numbers into the parameters and the optimiser. Every process calls it."""
    reader = HuggingFaceStorageReader(str(saved.path))
    held = {name: entry.size for name, entry in reader.read_metadata().state_dict_metadata.items()}
    expected = {f"model.{name}": parameter.shape for name, parameter in parameters.items()}
    if {name: size for name, size in held.items() if name.startswith("model.")} != expected:
        raise CheckpointError(f"{saved.path} holds another model; choose another output folder")
    local = _local(optimizer)
    mine = {parameter for group in local.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        if parameter in mine and f"{_MOMENTS[0]}.{name}" in held:
            moments = {moment: torch.empty_like(parameter, requires_grad=False) for moment in _MOMENTS}
            local.state[parameter] = {"step": torch.tensor(float(updates), device=parameter.device), **moments}
    try:
        with _quiet():
            dcp.load(_tensors(parameters, optimizer), storage_reader=reader)
    except CheckpointException as error:
        raise CheckpointError(f"{saved.path} cannot be read: {_reason(error)}; {_ADVICE}") from None
