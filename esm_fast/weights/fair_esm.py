"""fair-esm's .pt files, and the contact regressions it publishes beside them."""

from pathlib import Path

import torch

from ..alphabet import MASK
from ..models.esm1 import Config
from .checkpoint import CONTACT_KEYS, Checkpoint, CheckpointError
from .safe import read_torch


def read_content(path: Path, content: dict) -> Checkpoint:
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
    content = read_torch(side)
    found = content.get("model") if isinstance(content, dict) else None
    if not isinstance(found, dict) or set(found) != CONTACT_KEYS:
        raise CheckpointError(f"{side} is no contact regression: expected 'model' with {sorted(CONTACT_KEYS)}")
    return found


def _required(path: Path, args: dict, name: str) -> int:
    value = args.get(name)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: the argument {name!r} is {value!r}, expected a positive integer")
    return value
