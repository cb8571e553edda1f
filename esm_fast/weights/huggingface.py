"""Hugging Face folders: a config.json, and the tensors in one file or in shards."""

from pathlib import Path

from ..models.family import Config, Family, LayoutError, families, of_config, renamed, titles
from .checkpoint import Checkpoint, CheckpointError, shown
from .safe import read_json, read_tensors, require_tensors

# What transformers' fields are: a text in the place of a flag would count as true.
_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"),
    *("vocab_size", "pad_token_id", "mask_token_id", "layer_norm_eps"),
)
_FLAGS = ("token_dropout", "emb_layer_norm_before", "is_decoder", "is_folding_model", "add_cross_attention")
_TYPES = (
    (_SIZES[:-1], (int,), "an integer"),
    (_SIZES[-1:], (int, float), "a number"),
    (_FLAGS, (bool,), "true or false"),
)


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
    for names, types, expected in _TYPES:
        for name in names:
            if type(hf.get(name)) not in (*types, type(None)):
                raise CheckpointError(f"{source}: {name!r} is {shown(repr(hf[name]))}, expected {expected}")
    hf = {name: value for name, value in hf.items() if value is not None or name not in _SIZES}
    try:
        return family_of(hf, source).config_from_hf(hf)
    except ValueError as error:  # LayoutErrors, and sizes that cannot be
        raise CheckpointError(f"{source}: {error}") from None
    except KeyError as missing:
        raise CheckpointError(f"{source}: {missing.args[0]!r} is missing") from None


_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in this order, each whole or in shards


def files_of(folder: Path) -> list[Path]:
    """What `read_folder` reads of a folder: its config.json, the index of its shards if any, and the tensors' files.

    Raises CheckpointError. The shards that the index names may be missing.
    """
    config = folder / "config.json"
    if not config.exists():
        raise CheckpointError(f"{folder} holds no config.json: it is not a Hugging Face model folder")
    for name in _WEIGHTS:
        if (folder / name).exists():
            return [config, folder / name]
        if (index := folder / f"{name}.index.json").exists():
            return [config, index, *(folder / shard for shard in _shards(index))]
    raise CheckpointError(f"{folder} holds neither {' nor '.join(_WEIGHTS)}")


def _shards(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from tensors to files; download it again")
    shards = sorted(set(names.values()))
    if any(Path(shard).name != shard or shard == ".." for shard in shards):
        raise CheckpointError(f"{index} names a file outside its folder")
    return shards


def read_folder(folder: Path) -> Checkpoint:
    config, *rest = files_of(folder)
    files = [file for file in rest if not file.name.endswith(".index.json")]
    if missing := [file for file in files if not file.exists()]:
        raise CheckpointError(f"{missing[0]} is missing, which {rest[0].name} names; download it")
    return _checkpoint(folder, config, {file: read_tensors(file) for file in files})


def read_beside_config(file: Path, content: object = None) -> Checkpoint:
    """One file of a folder with a config.json: that file, whatever else lies there. content: if it was read already."""
    tensors = read_tensors(file) if content is None else content
    return _checkpoint(file, file.with_name("config.json"), {file: tensors})


def _checkpoint(source: Path, config_file: Path, contents: dict[Path, object]) -> Checkpoint:
    config = config_from_hf(read_json(config_file), config_file)
    family, tensors = of_config(config), {}
    for file, content in contents.items():
        try:
            found = renamed(require_tensors(file, content), family.from_hf_key)
        except LayoutError as error:
            raise CheckpointError(f"{file}: {error}") from None
        if twice := sorted(set(found) & set(tensors)):
            raise CheckpointError(f"{file}: {shown(twice[0])} is in another file of {source} too")
        tensors |= found
    return Checkpoint(source, "transformers", config, tensors)
