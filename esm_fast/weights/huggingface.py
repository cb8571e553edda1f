"""Hugging Face folders: a config.json, and the tensors in one file or in shards."""

import json
from pathlib import Path

import torch

from ..alphabet import MASK, PAD, TOKENS
from ..models.esm1 import Config
from .checkpoint import Checkpoint, CheckpointError
from .safe import read_safetensors, read_torch

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


def read_folder(folder: Path) -> Checkpoint:
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
    for name, read_file in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch)):
        if (folder / name).exists():
            return read_file(folder / name)
        if (index := folder / f"{name}.index.json").exists():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if any(Path(shard).name != shard for shard in shards):
                raise CheckpointError(f"{index} names a file outside its folder")
            return {key: tensor for shard in shards for key, tensor in read_file(folder / shard).items()}
    raise CheckpointError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
