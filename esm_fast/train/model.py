"""The model as it is trained: the loss on the selected rows, in half precision from fp32 parameters."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ..models.esm1 import ESM1, Config
from ..ops.masked_lm_head import IGNORED
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
        _, loss = self.esm.lm_head(x, *_filled_up(masked.rows, masked.targets), backend=self.esm.backend)
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


# Of a table of waves, each entry's size: Adam moves the rows of a table by its learning rate whatever their gradient,
# and most of theirs is noise: 0.05 within a few thousand steps of 1e-3. What is to survive begins well above that.
_WAVES_RMS = 0.1
_SHARPNESS = 1.5  # of queries and keys that find a neighbour: its weight is about half of all at first


def new_model(config: Config, seed: int, std: float, *, attention: str = "normal") -> ESM1:
    """A model to be trained, initialised as RoBERTa is (Liu et al. 2019): matrices N(0, std), biases 0, gains 1.

    attention: "normal", or "neighbours": two heads of layer l begin by looking at the residues l before and l behind.
    For that the table of positions, learned all the same, begins as waves, whose phase a head can shift. A short run
    does not find neighbours from random numbers, and then learns each protein's composition and nothing about order.
    """
    model = ESM1(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std, generator=generator)
            else:
                parameter.fill_(1.0 if "layer_norm" in name and name.endswith("weight") else 0.0)
        if attention == "neighbours":
            _look_at_neighbours(model, generator)
        for table in (model.embed_tokens, model.embed_positions):
            table.weight[table.padding_idx] = 0
        model.contact_head.regression.weight.zero_()  # "not fitted", as `weights.save` understands it
    return model


def _look_at_neighbours(model: ESM1, generator: torch.Generator) -> None:
    """Position i becomes (sin w i, cos w i) for random frequencies w, so that rows are alike only where they are equal
    (Rahimi and Recht 2007). A query holds some of these waves as they are, and the key of j those of j - offset."""
    rows, width = model.embed_positions.weight.shape
    frequency = torch.rand(width // 2, generator=generator) * math.pi
    angle = torch.arange(rows)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], 1) * (_WAVES_RMS * 2**0.5)
    model.embed_positions.weight[:, : waves.shape[1]] = waves
    for distance, layer in enumerate(model.layers, start=1):
        projections = layer.self_attn.q_proj, layer.self_attn.k_proj
        queries, keys = (p.weight.unflatten(0, (model.config.attention_heads, -1)) for p in projections)
        for head, offset in zip(range(len(queries)), (-distance, distance), strict=False):
            chosen = torch.randperm(len(frequency), generator=generator)[: queries.shape[1] // 2]
            queries[head], keys[head] = (_shifted(chosen, frequency, shift, queries.shape[1:]) for shift in (0, offset))


def _shifted(chosen: torch.Tensor, frequency: torch.Tensor, shift: int, shape: torch.Size) -> torch.Tensor:
    """(head_dim, width): takes the chosen waves of position i - shift from the row of position i."""
    matrix, count, sines = torch.zeros(shape), len(chosen), torch.arange(len(chosen))
    turn = frequency[chosen] * -shift
    matrix[sines, chosen], matrix[sines, chosen + len(frequency)] = turn.cos(), turn.sin()
    matrix[count + sines, chosen], matrix[count + sines, chosen + len(frequency)] = -turn.sin(), turn.cos()
    return matrix * _SHARPNESS


def training_flops(config: Config, lengths, selected: int) -> float:
    """Floating-point operations of one forward and backward pass over sequences of these lengths (in tokens)."""
    width, depth = config.embed_dim, config.layers
    per_token = 2 * depth * (4 * width * width + 2 * width * config.ffn_embed_dim)
    attention = 4 * depth * width * float((lengths.astype(float) ** 2).sum())
    head = 2 * selected * width * (width + 33)
    return 3 * (per_token * float(lengths.sum()) + attention + head)
