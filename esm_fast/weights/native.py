"""Our own files: safetensors with the configuration and a checksum, its matrices plain or prepacked."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .. import _C
from ..files.atomic import atomic
from ..formats import file as prepacked_file
from ..formats.weight import PrepackedWeight
from ..memory import MappedFiles
from ..models.encoder import Encoder
from ..models.family import Config, config_class
from . import integrity
from .checkpoint import CONTACT_KEYS, Checkpoint, CheckpointError
from .huggingface import read_beside_config
from .safe import parsed_json, read_safetensors, safetensors_errors

FORMAT = "esm_fast"


def save(model: Encoder, path: str | Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Writes a model as our own safetensors (no pickle) with its configuration and checksum; returns the checksum.

    The matrices of a prepacked model are stored prepacked. on_bytes: told of each tensor's bytes as they are hashed.
    """
    found, tied = model.state_dict(), model.tied()
    for key, of in tied.items():  # which a file holds once
        if found[key].data_ptr() != found[of].data_ptr() and not torch.equal(found[key], found[of]):
            raise CheckpointError(f"{key} differs from {of}; in files of this model they are one")
    tensors = {key: value.detach().contiguous().cpu() for key, value in found.items() if key not in tied}
    if not bool(tensors["contact_head.regression.weight"].any()):
        tensors = {key: tensor for key, tensor in tensors.items() if key not in CONTACT_KEYS}
    config = json.dumps(asdict(model.config))
    metadata = {
        "format": FORMAT,
        "version": "1",
        "config": config,
        "sha256": checksum(tensors, lambda view: on_bytes(view.nbytes)),
    }
    kinds = {tensor.weights.dtype for tensor in tensors.values() if isinstance(tensor, PrepackedWeight)}
    if kinds:
        metadata |= {"packed": kinds.pop(), "layout": str(_C.LAYOUT), "sha256_start": _start_checksum(config, tensors)}
        write = prepacked_file.write
    else:
        metadata["sha256_config"] = _digest(config)
        write = save_file
    with atomic(Path(path), durable=False) as temporary:
        write(tensors, temporary, metadata)
    return metadata["sha256"]


def checksum(tensors: dict[str, torch.Tensor], after: Callable[[memoryview], None] = lambda view: None) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, in order of the names; `after` gets its bytes."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(integrity.line_of(key, str(tensor.dtype), tuple(tensor.shape)))
        view = prepacked_file.content(tensor)
        digest.update(view)
        after(view)
    return digest.hexdigest()


def _start_checksum(config: str, tensors: dict[str, torch.Tensor]) -> str:
    """What is checked each time a prepacked file is loaded: all but the panels, which are 99 % of it."""
    rest = {key: tensor for key, tensor in tensors.items() if not isinstance(tensor, PrepackedWeight)}
    return hashlib.sha256((config + checksum(rest)).encode()).hexdigest()


def metadata_of(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says besides its tensors."""
    with safetensors_errors(path), safe_open(path, "pt") as file:
        return file.metadata() or {}


def is_own(path: Path) -> bool:
    """Whether we wrote a safetensors file, which then needs no config.json beside it."""
    return metadata_of(path).get("format") == FORMAT


def read_file(path: Path, verify: bool) -> Checkpoint:
    metadata = metadata_of(path)
    if metadata.get("format") != FORMAT:
        if (path.parent / "config.json").exists():
            return read_beside_config(path)
        raise CheckpointError(f"{path} was not written by 'esm-fast convert' and has no config.json beside it")
    config = _config(path, metadata)
    tensors, mapped = read_safetensors(path), MappedFiles()
    if "packed" in metadata:
        tensors = _packed(path, config, tensors, metadata)

    def forget(view: memoryview) -> None:
        mapped.forget_bytes(prepacked_file.address(view), view.nbytes)

    # Of panels only where it is asked for; of plain tensors from an earlier reading, if there was one.
    if verify or "packed" not in metadata:
        found = (None if verify else integrity.tensors_checksum(path)) or checksum(tensors, after=forget)
        if found != metadata.get("sha256"):
            raise CheckpointError(
                f"{path} is damaged: its tensors do not match its checksum; convert or download it again"
            )
    return Checkpoint(path, "esm_fast", config, tensors, metadata.get("sha256"))


def _config(path: Path, metadata: dict[str, str]) -> Config:
    text = metadata.get("config", "")
    # Older files have no checksum of it; those with prepacked matrices have one over it and their other tensors.
    if metadata.get("sha256_config", _digest(text)) != _digest(text):
        raise CheckpointError(f"{path} is damaged: its configuration does not match its checksum; convert it again")
    values = parsed_json(text, f"the configuration in {path}")
    try:
        return config_class(values)(**values)
    except (TypeError, ValueError) as error:
        reason = str(error).partition("__init__() ")[2] or error
        raise CheckpointError(f"{path}: its configuration is damaged or of another version: {reason}") from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _packed(path: Path, config: Config, stored: dict[str, torch.Tensor], metadata: dict[str, str]):
    """The tensors of a file of `esm-fast convert --pack`; the panels stay unread."""
    if metadata.get("layout") != str(_C.LAYOUT):
        raise CheckpointError(
            f"{path} holds prepacked weights in layout {metadata.get('layout')}, this version of esm_fast reads layout "
            f"{_C.LAYOUT}; convert the original again"
        )
    try:
        tensors = prepacked_file.view(stored, config, metadata["packed"])
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or was rewritten: {error}; convert the original again") from None
    if _start_checksum(metadata["config"], tensors) != metadata.get("sha256_start"):
        raise CheckpointError(f"{path} is damaged: it does not match its checksum; convert or download it again")
    return tensors
