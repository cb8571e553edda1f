"""The model as it is trained: the loss on the selected rows, in half precision from fp32 parameters."""

import torch
from torch import nn
from torch.func import functional_call

from ..models.esm1 import ESM1, Config
from .masking import MaskedBatch


class MaskedLM(nn.Module):
    """The sum of the cross-entropies over a batch's selected rows; divide by their number over all processes."""

    def __init__(self, esm: ESM1):
        super().__init__()
        self.esm = esm
        esm.contact_head.requires_grad_(False)  # no part of the loss

    def forward(self, masked: MaskedBatch) -> torch.Tensor:
        depth = self.esm.config.layers
        x = self.esm.forward_packed(masked.batch, layers=(depth,)).representations[depth]
        _, loss = self.esm.lm_head(x, masked.rows, masked.targets, backend=self.esm.backend)
        return loss


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


# Of each entry of a sinusoidal table. Adam moves the rows of a table by its learning rate whatever their gradient, and
# most of theirs is noise: 0.05 within a few thousand steps of 1e-3. What is to survive begins well above that.
_SINUSOIDAL_RMS = 0.1


def new_model(config: Config, seed: int, std: float, *, attention: str = "normal") -> ESM1:
    """A model to be trained, initialised as RoBERTa is (Liu et al. 2019): matrices N(0, std), biases 0, gains 1.

    attention: "normal", or "local": every head begins by looking at a residue's neighbours. The table of positions,
    learned all the same, begins as the waves of Vaswani et al. (2017), whose likeness falls with distance, and queries
    equal keys (Trockman and Kolter 2023). A short run does not find that from random numbers, and then learns each
    protein's composition and nothing about order.
    """
    model = ESM1(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std, generator=generator)
            else:
                parameter.fill_(1.0 if "layer_norm" in name and name.endswith("weight") else 0.0)
        if attention == "local":
            model.embed_positions.weight.copy_(_waves(*model.embed_positions.weight.shape))
            for layer in model.layers:
                heads = layer.self_attn.q_proj.weight.unflatten(0, (config.attention_heads, -1))
                for head in heads:
                    nn.init.orthogonal_(head, generator=generator)
                layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
        for table in (model.embed_tokens, model.embed_positions):
            table.weight[table.padding_idx] = 0
        model.contact_head.regression.weight.zero_()  # "not fitted", as `weights.save` understands it
    return model


def _waves(rows: int, width: int) -> torch.Tensor:
    """(rows, width): sines, then cosines, of wavelengths from 2 pi to 20,000 pi rows."""
    frequency = 10_000 ** -torch.linspace(0, 1, (width + 1) // 2)
    angle = torch.arange(rows)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width] * (_SINUSOIDAL_RMS * 2**0.5)


def training_flops(config: Config, lengths, selected: int) -> float:
    """Floating-point operations of one forward and backward pass over sequences of these lengths (in tokens)."""
    width, depth = config.embed_dim, config.layers
    per_token = 2 * depth * (4 * width * width + 2 * width * config.ffn_embed_dim)
    attention = 4 * depth * width * float((lengths.astype(float) ** 2).sum())
    head = 2 * selected * width * (width + 33)
    return 3 * (per_token * float(lengths.sum()) + attention + head)
