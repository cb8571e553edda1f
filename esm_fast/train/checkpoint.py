"""Checkpoints by torch.distributed.checkpoint: folders of safetensors, whole and verified, or not there at all.

Every process writes and reads its share: parameters are divided, and Adam's moments written by whoever holds them. Any
number of processes reads what any other wrote, however they shared the optimiser.
"""

import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from ..files.atomic import sync
from ..files.checked_json import DamagedError, read_json, write_json
from ..files.checksums import sha256
from .processes import Processes
from .updates import MOMENTS

_INFO = "checkpoint.json"  # the run's numbers, and the files' checksums and its own
# A process holds a file in memory while it writes it, and safetensors, which makes it, lets no other Python run: a step
# beside it stands still, for 1.3 to 1.5 s in a file of 500 MB.
_FILE_BYTES = 2**26
_ADVICE = "choose another output folder, or delete it to begin again"
# Names of our own alone: what else lies in these folders is somebody's.
_OWN = re.compile(r"step_\d{9}")
_OWN_PARTIAL = re.compile(r"\.step_\d{9}\.partial")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, of another run, or cannot be written; the message names it."""


@dataclass(frozen=True)
class Saved:
    path: Path
    state: dict


class Share(NamedTuple):
    """What this process writes. tensors: by name; files: in which file of each process one goes, of all there are."""

    tensors: dict[str, torch.Tensor]
    files: dict[str, int]


def share_of(parameters: dict, updater, processes: Processes, *, copy: bool) -> Share:
    """A share of the parameters and of their moments. Every process calls it.

    parameters: by name; updater: `updates.Replicated` or `sharded.Sharded`. copy: in host memory, so that they may
    change while it is written: 12 bytes a parameter, divided by the processes.
    """
    mine = {name: parameters[name] for name in list(parameters)[processes.rank :: processes.world]}
    if copy:
        mine = {name: parameter.detach().to("cpu", copy=True) for name, parameter in mine.items()}
    return Share(_tensors(mine, updater.held(list(mine), copy=copy)), _files(parameters))


def save(folder: Path, step: int, share: Share, state: dict, keep: int, processes: Processes) -> Path:
    """Writes the folder step_N and removes all but the newest `keep`. Every process calls it.

    state: the run's numbers, for JSON. Raises CheckpointError.
    """
    path = folder / f"step_{step:09d}"
    partial = _partial(path)
    if processes.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.wait()
    writer = HuggingFaceStorageWriter(str(partial), share.files, save_distributed=True)
    try:
        dcp.save(share.tensors, storage_writer=writer, process_group=processes.group)
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
    """Removes the checkpoints that a process was killed over."""
    for leftover in _named(folder, _OWN_PARTIAL):
        shutil.rmtree(leftover)


def _named(folder: Path, name: re.Pattern) -> list[Path]:
    """The folders in `folder` of this very form of name, links not among them, in order."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if name.fullmatch(p.name) and p.is_dir() and not p.is_symlink())


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warning to a process that is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _tensors(parameters: dict, moments: Iterable[tuple[str, str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What this process has of a checkpoint, by name."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in parameters.items()}
    return tensors | {f"{moment}.{name}": tensor for moment, name, tensor in moments}


def _files(parameters: dict) -> dict[str, int]:
    """In which file of each process a tensor goes, from 1: all that a checkpoint can hold, _FILE_BYTES a file."""
    numbers, size = {}, 0
    for prefix in ("model", *MOMENTS):
        for name, parameter in parameters.items():
            numbers[f"{prefix}.{name}"] = 1 + size // _FILE_BYTES
            size += parameter.numel() * parameter.element_size()
    return numbers


def _reason(error: CheckpointException) -> str:
    return "; ".join(dict.fromkeys(str(failure) for failure, _ in error.failures.values()))


def paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. Copies and backups under other names are not among them."""
    return _named(folder, _OWN)


def newest(
    folder: Path, processes: Processes, tell: Callable[[str], None] = warnings.warn, *, aside: bool = True
) -> Saved | None:
    """The newest checkpoint that is whole, verified by each process in part; None where there is none.

    A damaged one is told of, and set aside as `step_N.damaged` unless the folder is another run's (aside=False).
    Raises CheckpointError where all are damaged, in all processes alike.
    """
    damaged = []
    for path in reversed(paths(folder)):
        processes.wait()
        state, problems = _verified(path, processes)
        if not problems:
            for one, why in damaged if processes.first else ():
                kept = f"; it is kept as {_set_aside(one).name}" if aside else ""
                tell(f"{one} is damaged ({why}): resuming from {path.name}{kept}")
            processes.wait()
            return Saved(path, state)
        damaged.append((path, ", ".join(problems)))
    if damaged:
        path, why = damaged[0]
        raise CheckpointError(f"{path} is damaged: {why}; there is no whole one before it; {_ADVICE}")
    return None


def _verified(path: Path, processes: Processes) -> tuple[dict, list[str]]:
    """(the run's numbers, what is wrong: the same in all processes)."""
    state, problems = {}, []
    try:
        info = read_json(path / _INFO)
        state, files = info["state"], info["files"]
        mine = sorted(files)[processes.rank :: processes.world]
        problems = [problem for name in mine if (problem := _problem(path / name, files[name]))]
    except (OSError, DamagedError, KeyError) as error:
        problems = [str(error)]
    return state, list(dict.fromkeys(sum(processes.gather(problems), [])))


def _set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that the run can write that step again."""
    for number in range(1000):
        aside = path.with_name(f"{path.name}.damaged" + (f".{number}" if number else ""))
        if not aside.exists():
            return path.rename(aside)
    raise CheckpointError(f"{path.parent} holds too many damaged checkpoints; remove them")


def _problem(file: Path, digest: str) -> str | None:
    if not file.exists():
        return f"{file.name} is missing"
    return None if sha256(file) == digest else f"{file.name} does not match its checksum"


def restore(saved: Saved, parameters: dict, updater, updates: int) -> None:
    """Puts a checkpoint's numbers into the parameters and their moments. Every process calls it."""
    reader = HuggingFaceStorageReader(str(saved.path))
    held = {name: entry.size for name, entry in reader.read_metadata().state_dict_metadata.items()}
    expected = {f"model.{name}": parameter.shape for name, parameter in parameters.items()}
    if {name: size for name, size in held.items() if name.startswith("model.")} != expected:
        raise CheckpointError(f"{saved.path} holds another model; choose another output folder")
    there = {name for name in parameters if f"{MOMENTS[0]}.{name}" in held}
    try:
        with quiet():
            dcp.load(_tensors(parameters, updater.wanted(there, updates)), storage_reader=reader)
    except CheckpointException as error:
        raise CheckpointError(f"{saved.path} cannot be read: {_reason(error)}; {_ADVICE}") from None
    updater.restored()
