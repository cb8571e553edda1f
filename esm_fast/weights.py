"""Checkpoints: fair-esm's .pt, Hugging Face folders and our own safetensors, told apart by content, read safely.

Nothing is unpickled but tensors, plain containers and argparse.Namespace (which fair-esm stores its arguments in).
Tensors stay memory-mapped where they need no conversion, so loading costs little more than the weights.
"""

import hashlib
import json
import math
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import _C, packed_file
from .alphabet import MASK, PAD, TOKENS
from .memory import MappedFiles, without_values
from .models.esm1 import ESM1, Config
from .packed import PackedWeight, plain
from .quantized import Int8Weight
from .writers.files import atomic

CONTACT_KEYS = {"contact_head.regression.weight", "contact_head.regression.bias"}
FORMAT = "esm_fast"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, unsafe, incomplete or of another family; the message names file and key."""


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
        return any(isinstance(tensor, PackedWeight) for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """As `engine.load` takes it: int8 where the layers' matrices have 8 bits."""
        if any(isinstance(tensor, Int8Weight) for tensor in self.tensors.values()):
            return torch.int8
        return self.tensors["embed_tokens.weight"].dtype

    def unpacked(self) -> "Checkpoint":
        """With plain matrices only, for training and for anything but the CPU kernels."""
        return replace(self, tensors={key: plain(tensor) for key, tensor in self.tensors.items()})


def read(path: str | Path, *, verify: bool = False) -> Checkpoint:
    """Reads a checkpoint file or a Hugging Face folder.

    Args:
        verify: also compare the packed matrices of a packed file with its checksum, which means to read them all.
            Otherwise their names and sizes are checked, and everything else in full.

    Raises:
        FileNotFoundError, CheckpointError.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        return _read_hf_folder(path)
    if _is_safetensors(path):
        return _read_own(path, verify)
    content = _torch_load(path)
    if isinstance(content, dict) and isinstance(content.get("args"), Namespace) and "model" in content:
        return _read_fair_esm(path, content)
    if isinstance(content, dict) and "cfg" in content:
        raise CheckpointError(f"{path} is an ESM-2 checkpoint (rotary positions); esm_fast reads ESM-1b and ESM-1v")
    if (path.parent / "config.json").exists():
        return _read_hf_folder(path.parent)
    raise CheckpointError(
        f"{path} is no ESM-1b checkpoint: expected fair-esm's 'args' and 'model', or a config.json beside it"
    )


def build(checkpoint: Checkpoint, model_class: type[ESM1] = ESM1, *, dtype=torch.float32, backend=None) -> ESM1:
    """A model holding a checkpoint's tensors: the very same memory where dtype needs no conversion.

    A missing, extra, mis-shaped or non-finite tensor is a CheckpointError naming it. Without contact regression or
    language-model head the model loads, with a warning unless we wrote the file, and says so when these are asked for.
    """
    with without_values():
        model = model_class(checkpoint.config, backend=backend).requires_grad_(not checkpoint.packed)
    tensors = dict(checkpoint.tensors)
    _check_tied(checkpoint, tensors)
    if not any(key.startswith("lm_head.") for key in tensors):
        warnings.warn(f"{checkpoint.source} has no language-model head: logits are not available", stacklevel=2)
        model.lm_head = None
    else:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    if not CONTACT_KEYS & set(tensors):
        if checkpoint.kind != "esm_fast":  # one that we wrote lacks it because its original did
            warnings.warn(f"{checkpoint.source} has no contact regression: contacts are not available", stacklevel=2)
        tensors |= {key: torch.zeros_like(model.get_parameter(key), device="cpu") for key in CONTACT_KEYS}
    expected = {key: parameter.shape for key, parameter in model.state_dict().items()}
    _check_tensors(checkpoint.source, tensors, expected)
    model.load_state_dict(_converted(checkpoint.source, tensors, dtype), assign=True)
    if model.lm_head is not None:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def save(model: ESM1, path: str | Path) -> str:
    """Writes a model as our own safetensors (no pickle) with its configuration and checksum; returns the checksum.

    The matrices of a packed model are stored packed.
    """
    tensors = {k: v.detach().contiguous().cpu() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    if not bool(tensors["contact_head.regression.weight"].any()):
        tensors = {key: tensor for key, tensor in tensors.items() if key not in CONTACT_KEYS}
    config = json.dumps(asdict(model.config))
    metadata = {"format": FORMAT, "version": "1", "config": config, "sha256": checksum(tensors)}
    kinds = {tensor.weights.dtype for tensor in tensors.values() if isinstance(tensor, PackedWeight)}
    if kinds:
        metadata |= {"packed": kinds.pop(), "layout": str(_C.LAYOUT), "sha256_start": _start_checksum(config, tensors)}
        write = packed_file.write
    else:
        write = save_file
    with atomic(Path(path), durable=False) as temporary:
        write(tensors, temporary, metadata)
    return metadata["sha256"]


def checksum(tensors: dict[str, torch.Tensor], after: Callable[[torch.Tensor], None] = lambda tensor: None) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, in order of the names; `after` gets each in turn."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(packed_file.content(tensor))
        after(tensor)
    return digest.hexdigest()


def _start_checksum(config: str, tensors: dict[str, torch.Tensor]) -> str:
    """What is checked each time a packed file is loaded: all but the panels, which are 99 % of it."""
    rest = {key: tensor for key, tensor in tensors.items() if not isinstance(tensor, PackedWeight)}
    return hashlib.sha256((config + checksum(rest)).encode()).hexdigest()


# --- fair-esm -------------------------------------------------------------------------------------------------------


def _read_fair_esm(path: Path, content: dict) -> Checkpoint:
    args = {name.removeprefix("encoder_"): value for name, value in vars(content["args"]).items()}
    if args.get("arch") != "roberta_large":
        raise CheckpointError(f"{path} holds the architecture {args.get('arch')!r}; esm_fast reads ESM-1b and ESM-1v")
    if any("inv_freq" in key for key in content["model"]):
        raise CheckpointError(f"{path} is an ESM-2 checkpoint (rotary positions); esm_fast reads ESM-1b and ESM-1v")
    tensors = {_from_fair_key(key): tensor for key, tensor in content["model"].items()}
    tensors |= _contact_regression(path)
    config = Config(
        layers=_required(path, args, "layers"),
        embed_dim=_required(path, args, "embed_dim"),
        ffn_embed_dim=_required(path, args, "ffn_embed_dim"),
        attention_heads=_required(path, args, "attention_heads"),
        max_positions=_required(path, args, "max_positions"),
        token_dropout=bool(args.get("token_dropout", False)),
        emb_layer_norm_before=any(key.startswith("emb_layer_norm_before") for key in tensors),
    )
    if "embed_tokens.weight" in tensors:
        # As fair-esm does: a <mask> has no embedding of its own. The table is tied, so its logit is the bias alone.
        tensors["embed_tokens.weight"] = _without_mask_row(tensors["embed_tokens.weight"])
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] = _without_mask_row(tensors["lm_head.weight"])
    return Checkpoint(path, "fair-esm", config, tensors)


def _from_fair_key(key: str) -> str:
    """'encoder.sentence_encoder.layers.0...' and 'encoder.lm_head...' -> fair-esm's canonical key."""
    return key.split("sentence_encoder.")[-1].removeprefix("encoder.")


def _without_mask_row(table: torch.Tensor) -> torch.Tensor:
    table = table.clone()
    table[MASK] = 0
    return table


def _contact_regression(path: Path) -> dict[str, torch.Tensor]:
    """The regression fair-esm publishes as a file of its own, beside the model's."""
    side = path.with_name(path.stem + "-contact-regression.pt")
    if not side.exists():
        return {}
    content = _torch_load(side)
    found = content.get("model") if isinstance(content, dict) else None
    if not isinstance(found, dict) or set(found) != CONTACT_KEYS:
        raise CheckpointError(f"{side} is no contact regression: expected 'model' with {sorted(CONTACT_KEYS)}")
    return found


def _required(path: Path, args: dict, name: str) -> int:
    value = args.get(name)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: the argument {name!r} is {value!r}, expected a positive integer")
    return value


# --- Hugging Face ---------------------------------------------------------------------------------------------------

_HF_TOP = {
    "embeddings.word_embeddings.": "embed_tokens.",
    "embeddings.position_embeddings.": "embed_positions.",
    "embeddings.layer_norm.": "emb_layer_norm_before.",
    "encoder.emb_layer_norm_after.": "emb_layer_norm_after.",
    "contact_head.": "contact_head.",
    "lm_head.decoder.": "lm_head.",
    "lm_head.": "lm_head.",
}
_HF_LAYER = {
    "attention.self.query.": "self_attn.q_proj.",
    "attention.self.key.": "self_attn.k_proj.",
    "attention.self.value.": "self_attn.v_proj.",
    "attention.output.dense.": "self_attn.out_proj.",
    "attention.LayerNorm.": "self_attn_layer_norm.",
    "intermediate.dense.": "fc1.",
    "output.dense.": "fc2.",
    "LayerNorm.": "final_layer_norm.",
}
# TensorFlow's names of the layer-norm parameters, which transformers still writes for some modules.
_HF_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_HF_IGNORED = ("embeddings.position_ids", "pooler.")


def from_hf_key(key: str) -> str | None:
    """transformers' parameter name (with or without 'esm.') -> fair-esm's; None for one ESM-1b does not use.

    An unknown name is returned as it is, so that the check of the tensors names it.
    """
    bare = key.removeprefix("esm.")
    for old, new in _HF_RENAMED.items():
        bare = bare.replace(old, new)
    if bare.startswith(_HF_IGNORED):
        return None
    prefix, names = "", _HF_TOP
    if bare.startswith("encoder.layer."):
        number, _, bare = bare.removeprefix("encoder.layer.").partition(".")
        prefix, names = f"layers.{number}.", _HF_LAYER
    for theirs, ours in names.items():
        if bare.startswith(theirs):
            return prefix + ours + bare.removeprefix(theirs)
    return key


def config_from_hf(hf: dict, source: str | Path) -> Config:
    """transformers' EsmConfig, as a dictionary, -> ours; CheckpointError when the model is of another family."""
    wanted = {
        "model_type": "esm",
        "position_embedding_type": "absolute",
        "vocab_size": len(TOKENS),
        "pad_token_id": PAD,
        "is_folding_model": False,
        "is_decoder": False,
        "add_cross_attention": False,
    }
    defaults = {"position_embedding_type": "absolute", "pad_token_id": PAD, "is_folding_model": False}
    defaults |= {"is_decoder": False, "add_cross_attention": False}
    for name, value in wanted.items():
        got = hf.get(name, defaults.get(name))
        if (got or False) != (value or False):
            raise CheckpointError(
                f"{source}: {name} is {got!r}; esm_fast reads ESM-1b and ESM-1v, where it is {value!r}"
            )
    if hf.get("token_dropout") and hf.get("mask_token_id") != MASK:
        raise CheckpointError(f"{source}: mask_token_id is {hf.get('mask_token_id')!r}, in ESM-1b it is {MASK}")
    try:
        return Config(
            layers=hf["num_hidden_layers"],
            embed_dim=hf["hidden_size"],
            ffn_embed_dim=hf["intermediate_size"],
            attention_heads=hf["num_attention_heads"],
            max_positions=hf["max_position_embeddings"] - PAD - 1,
            token_dropout=bool(hf.get("token_dropout")),
            emb_layer_norm_before=bool(hf.get("emb_layer_norm_before")),
            layer_norm_eps=hf.get("layer_norm_eps", 1e-12),  # transformers' own default; ESM-1b's files say 1e-5
        )
    except KeyError as missing:
        raise CheckpointError(f"{source}: {missing.args[0]!r} is missing") from None


def _read_hf_folder(folder: Path) -> Checkpoint:
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"{folder} holds no config.json: it is not a Hugging Face model folder")
    try:
        hf_config = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    config = config_from_hf(hf_config, file)
    tensors = {}
    for key, tensor in _hf_tensors(folder).items():
        if (canonical := from_hf_key(key)) is not None:
            tensors[canonical] = tensor
    return Checkpoint(folder, "transformers", config, tensors)


def _hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    for name, read_file in (("model.safetensors", _safetensors), ("pytorch_model.bin", _torch_load)):
        if (folder / name).exists():
            return read_file(folder / name)
        if (index := folder / f"{name}.index.json").exists():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if any(Path(shard).name != shard for shard in shards):
                raise CheckpointError(f"{index} names a file outside its folder")
            return {key: tensor for shard in shards for key, tensor in read_file(folder / shard).items()}
    raise CheckpointError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


# --- our own --------------------------------------------------------------------------------------------------------


def _read_own(path: Path, verify: bool) -> Checkpoint:
    with _safetensors_errors(path), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        if (path.parent / "config.json").exists():
            return _read_hf_folder(path.parent)
        raise CheckpointError(f"{path} was not written by 'esm-fast convert' and has no config.json beside it")
    try:
        config = Config(**json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be read ({error})") from None
    tensors, forget = _safetensors(path), MappedFiles().forget
    if "packed" in metadata:
        tensors, forget = _packed(path, config, tensors, metadata), lambda tensor: None
    if ("packed" not in metadata or verify) and checksum(tensors, after=forget) != metadata.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its tensors do not match its checksum; convert or download it again")
    return Checkpoint(path, "esm_fast", config, tensors, metadata.get("sha256"))


def _packed(path: Path, config: Config, stored: dict[str, torch.Tensor], metadata: dict[str, str]):
    """The tensors of a file of `esm-fast convert --pack`; the panels stay unread."""
    if metadata.get("layout") != str(_C.LAYOUT):
        raise CheckpointError(
            f"{path} holds packed weights in layout {metadata.get('layout')}, this version of esm_fast reads layout "
            f"{_C.LAYOUT}; convert the original again"
        )
    try:
        tensors = packed_file.view(stored, config, metadata["packed"])
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or was rewritten: {error}; convert the original again") from None
    if _start_checksum(metadata["config"], tensors) != metadata.get("sha256_start"):
        raise CheckpointError(f"{path} is damaged: it does not match its checksum; convert or download it again")
    return tensors


# --- files ----------------------------------------------------------------------------------------------------------


def _is_safetensors(path: Path) -> bool:
    """A safetensors file begins with the length of its header, and the header is a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and length <= path.stat().st_size


class _safetensors_errors:
    """Turns what safetensors says of a damaged file into a CheckpointError."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, SafetensorError):
            raise CheckpointError(f"{self.path} is damaged or incomplete: {error}") from None


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    with _safetensors_errors(path), safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)


def _torch_load(path: Path) -> dict:
    """torch.load of tensors and plain containers only, memory-mapped when the file allows it. There is no fallback."""
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        if zipped:
            unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace"}
            if unsafe:
                raise CheckpointError(f"{path} would run code when loaded ({', '.join(sorted(unsafe))}); it was not")
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many types for damaged files, none of them specific
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from None


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_tied(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    table, head = tensors.get("embed_tokens.weight"), tensors.get("lm_head.weight")
    if table is not None and head is not None and not torch.equal(table, head):
        raise CheckpointError(f"{checkpoint.source}: lm_head.weight differs from embed_tokens.weight; ESM-1b ties them")


def _check_tensors(source: Path, tensors: dict[str, torch.Tensor], expected: dict[str, torch.Size]) -> None:
    problems = [f"missing {key}" for key in sorted(set(expected) - set(tensors))]
    problems += [f"unexpected {key}" for key in sorted(set(tensors) - set(expected))]
    for key in sorted(set(expected) & set(tensors)):
        tensor = tensors[key]
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            problems.append(f"{key} is no floating-point tensor")
        elif tensor.shape != expected[key]:
            problems.append(f"{key} has shape {tuple(tensor.shape)}, expected {tuple(expected[key])}")
    _raise(source, problems)


def _converted(source: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors in dtype, each checked to be finite, in little more memory than the result takes.

    Packed ones were checked when they were packed, and keep their type.
    """
    mapped, problems, converted = MappedFiles(), [], {}
    for key, tensor in tensors.items():
        if isinstance(tensor, PackedWeight):
            converted[key] = tensor
            continue
        if not all(math.isfinite(bound) for bound in tensor.aminmax()):  # NaN propagates; no copy is made
            problems.append(f"{key} holds NaN or infinity")
        converted[key] = tensor.to(dtype)
        if converted[key] is not tensor:
            mapped.forget(tensor)
    _raise(source, problems)
    return converted


def _raise(source: Path, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(f"{source} does not fit its configuration: {'; '.join(problems[:10])}{more}")
