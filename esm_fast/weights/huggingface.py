"""Hugging Face folders: a config.json, and the tensors in one file or in shards."""

import json
from pathlib import Path

import torch

from ..models.family import Config, Family, LayoutError, families, of_config, titles
from .checkpoint import Checkpoint, CheckpointError
from .safe import read_safetensors, read_torch


def family_of(hf: dict, source: str | Path) -> Family:
    """The family of a configuration of transformers', as a dictionary. Raises CheckpointError."""
    if hf.get("model_type") != "esm":
        raise CheckpointError(f"{source}: model_type is {hf.get('model_type')!r}; esm_fast reads {titles()}, 'esm'")
    for family in families().values():
        if family.reads_hf(hf):
            return family
    kind = hf.get("position_embedding_type")
    raise CheckpointError(f"{source}: position_embedding_type is {kind!r}; esm_fast reads {titles()}")


def config_from_hf(hf: dict, source: str | Path) -> Config:
    """transformers' EsmConfig, as a dictionary, -> ours; CheckpointError when no family is like it."""
    try:
        return family_of(hf, source).config_from_hf(hf)
    except LayoutError as error:
        raise CheckpointError(f"{source}: {error}") from None
    except KeyError as missing:
        raise CheckpointError(f"{source}: {missing.args[0]!r} is missing") from None


def read_folder(folder: Path) -> Checkpoint:
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"{folder} holds no config.json: it is not a Hugging Face model folder")
    try:
        hf_config = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    config = config_from_hf(hf_config, file)
    family, tensors = of_config(config), {}
    for key, tensor in _hf_tensors(folder).items():
        if (canonical := family.from_hf_key(key)) is not None:
            tensors[canonical] = tensor
    return Checkpoint(folder, "transformers", config, tensors)


def _hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    for name, read_file in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch)):
        if (folder / name).exists():
            return read_file(folder / name)
        if (index := folder / f"{name}.index.json").exists():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if any(Path(shard).name != shard for shard in shards):
                raise CheckpointError(f"{index} names a file outside its folder")
            return {key: tensor for shard in shards for key, tensor in read_file(folder / shard).items()}
    raise CheckpointError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
