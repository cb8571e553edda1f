"""The model as it is trained: the loss on the selected rows, in half precision from fp32 parameters."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ..models.encoder import Encoder
from ..models.family import Config, of_config
from ..ops.masked_lm_head import IGNORED
from .masking import MaskedBatch


class MaskedLM(nn.Module):
    """The sum of the cross-entropies over a batch's selected rows; divide by their number over all processes."""

    def __init__(self, esm: Encoder):
        super().__init__()
        self.esm = esm
        esm.contact_head.requires_grad_(False)  # no part of the loss

    def forward(self, masked: MaskedBatch) -> torch.Tensor:
        depth = self.esm.config.layers
        x = self.esm.forward_packed(masked.batch, layers=(depth,)).representations[depth]
        _, loss = self.esm.logits_of(x, *_filled_up(masked.rows, masked.targets))
        return loss


_ROWS = 128


def _filled_up(rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """To a multiple of 128, with rows that count nothing: every batch selects another number, and libraries keep what
    they make for each, oneDNN the code of bf16 products for good."""
    missing = -len(rows) % _ROWS
    return F.pad(rows, (0, missing)), F.pad(targets, (0, missing), value=IGNORED)


class InPrecision(nn.Module):
    """A module run in `dtype` from its fp32 parameters.

    Parameters are cast inside the graph, so gradients arrive, are accumulated and are reduced over processes in fp32,
    and there is one set of parameters: nothing can fall out of step.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args):
        if self.dtype == torch.float32:
            return self.module(*args)
        weights = {name: parameter.to(self.dtype) for name, parameter in self.module.named_parameters()}
        return functional_call(self.module, weights, args, tie_weights=True)


def new_model(config: Config, seed: int, std: float, *, attention: str = "normal") -> Encoder:
    """A model to be trained, initialised as RoBERTa is (Liu et al. 2019): matrices N(0, std), biases 0, gains 1.

    attention: "normal", or one of what the family offers, such as "neighbours" (see its file).
    """
    family = of_config(config)
    if attention != "normal" and attention not in family.attention:
        raise ValueError(
            f"attention is {attention!r}; {family.title} can begin as {', '.join(['normal', *family.attention])}"
        )
    model = family.model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std, generator=generator)
            else:
                parameter.fill_(1.0 if "layer_norm" in name and name.endswith("weight") else 0.0)
        if attention != "normal":
            family.attention[attention](model, generator)
        model.clear_padding()
        model.contact_head.regression.weight.zero_()  # "not fitted", as `weights.save` understands it
    return model


def training_flops(config: Config, lengths, selected: int) -> float:
    """Floating-point operations of one forward and backward pass over sequences of these lengths (in tokens)."""
    width, depth = config.embed_dim, config.layers
    per_token = 2 * depth * (4 * width * width + 2 * width * config.ffn_embed_dim)
    attention = 4 * depth * width * float((lengths.astype(float) ** 2).sum())
    head = 2 * selected * width * (width + 33)
    return 3 * (per_token * float(lengths.sum()) + attention + head)
