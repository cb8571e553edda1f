"""Low-rank adapters (LoRA, Hu et al. 2022) by the library peft, under the ops that this package runs.

The ops take matrices, not modules: `TransformerLayer.weights` adds what the adapters make of theirs, so that every
backend computes with them. The result is that of peft's own forward pass without dropout.
"""

from collections.abc import Iterable

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


def _adapted(model: Encoder) -> Iterable[tuple[nn.Module, str, nn.Module]]:
    for parent in model.layers.modules():
        for name, child in parent.named_children():
            if hasattr(child, "get_delta_weight"):
                yield parent, name, child
