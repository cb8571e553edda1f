"""Low-rank adapters (LoRA, Hu et al. 2022) by the library peft, under the ops that this package runs.

An adapted matrix is a module of peft's, which is called on packed rows between the ops (see `models.attached`).
"""

from collections.abc import Iterable

import torch
from torch import nn

from ..models.encoder import Encoder

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def add(model: Encoder, rank: int) -> None:
    """Freezes the model and puts an adapter of this rank on every matrix of its layers."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("LoRA needs peft: pip install 'esm_fast[lora]'") from None
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(TARGETS))
    inject_adapter_in_model(config, model.layers)


def merge(model: Encoder) -> None:
    """Adds the adapters to their matrices and takes them out."""
    for parent, name, adapted in list(_adapted(model)):
        adapted.merge()
        setattr(parent, name, adapted.get_base_layer())


def found(model: Encoder) -> dict[str, torch.Tensor]:
    """The two factors of what is added to each matrix: layers.N.NAME.a (rank, in), .b (out, rank), scaled."""
    factors = {}
    for parent, name, adapted in _adapted(model):
        (key,) = adapted.active_adapters
        path = f"layers.{next(path for path, module in model.layers.named_modules() if module is parent)}.{name}"
        factors[f"{path}.a"] = adapted.lora_A[key].weight.detach().clone()
        factors[f"{path}.b"] = adapted.lora_B[key].weight.detach() * adapted.scaling[key]
    return factors


def merged(tensors: dict[str, torch.Tensor], factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's tensors with what `found` gave added to its matrices, in float32. Raises KeyError, ValueError."""
    made = dict(tensors)
    for name, a in factors.items():
        if name.endswith(".a"):
            path = name.removesuffix(".a")
            key, b = f"{path}.weight", factors[f"{path}.b"]
            if a.ndim != 2 or b.ndim != 2 or (len(b), a.shape[1]) != tensors[key].shape or len(a) != b.shape[1]:
                raise ValueError(f"the adapter of {path} does not fit its matrix")
            made[key] = tensors[key].float() + b @ a
    return made


def _adapted(model: Encoder) -> Iterable[tuple[nn.Module, str, nn.Module]]:
    for parent in model.layers.modules():
        for name, child in parent.named_children():
            if hasattr(child, "get_delta_weight"):
                yield parent, name, child
