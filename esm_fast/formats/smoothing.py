"""What 8 bits find hard in a transformer layer, taken out of it before it is quantised: exactly, and without data.

A few made-up proteins go through the layers as these are read. Where a channel of a layer norm's result is far from 0
throughout, as in trained models a few are in every layer, the norm's bias gives its mean up and the biases of the
matrices behind it take that over (as in Outlier Suppression+, Wei et al. 2023). What is left is balanced: a factor per
channel moves from the norm into the matrices, so that activations and weights share the burden (SmoothQuant, Xiao et
al. 2023). Means have three digits and factors one, in base 2, so that rounding changes neither, on any machine.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..ops.common import gelu, layer_norm, spans
from ..ops.pre_ln_attention import rotate
from ..sequences.batching import PackedBatch, pack
from .original import Original
from .weight import MATRICES, is_prepacked, matrices_of

_PROTEINS, _LENGTH = 4, 128
# Residues as often as in UniProt, per thousand, in the alphabet's order: LAGVSERTIDPKQNFYMHWC.
_FREQUENCIES = (97, 83, 71, 69, 66, 67, 55, 54, 59, 55, 47, 58, 39, 41, 39, 29, 24, 23, 11, 13)
_FIRST_RESIDUE = 4
_FAR = 4.0  # means so many times as large as a usual channel's size are taken out
_AT_ONCE = 1 << 18  # elements of a matrix that are widened together
_HIDDEN_AT_ONCE = 256  # hidden units of the FFN whose results are there together
_EXPONENT = 30


def sample() -> PackedBatch:
    """Some proteins, the same ones always: a linear congruence (Knuth's MMIX) draws their residues."""
    state, residues = 1, []
    borders = np.cumsum(_FREQUENCIES)
    for _ in range(_PROTEINS * _LENGTH):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        residues.append(_FIRST_RESIDUE + int(np.searchsorted(borders, (state >> 33) % int(borders[-1]), side="right")))
    lengths = np.full(_PROTEINS, _LENGTH)
    return pack(np.array(residues, np.uint8), np.arange(_PROTEINS) * _LENGTH, lengths, np.arange(_PROTEINS))


class Smoothing:
    """Is called with each layer of a model in turn, before its matrices are quantised; changes norms and biases.

    Returns for names of `MATRICES` a factor per input, by which the matrix is to be multiplied. All else is computed in
    fp64, a part of a matrix at a time, whatever the model's type is.
    """

    @torch.no_grad()
    def __init__(self, model, original=None):
        self.original = original or (lambda linear: Original(linear.weight, linear.weight.dtype))
        self.heads = model.config.attention_heads
        batch = sample()
        self.spans, self.rotary = spans(batch.cu_seqlens), model.rotary(batch)
        self.x = model.embed(batch, None).double()

    @torch.no_grad()
    def __call__(self, layer) -> dict[str, torch.Tensor]:
        if any(map(is_prepacked, matrices_of(layer))):
            raise ValueError("a layer that is prepacked already cannot be smoothed")
        factors = {}
        inner, norm = layer.self_attn, layer.self_attn_layer_norm
        normed, inputs = _normed(self.x, norm), (inner.q_proj, inner.k_proj, inner.v_proj)
        mixed = self._attend(*(self._product(normed, part) for part in inputs))
        factors |= dict.fromkeys(MATRICES[:3], self._smooth(norm, inputs, normed))
        self.x += self._product(mixed, inner.out_proj)
        del mixed, normed  # before the FFN, which takes most
        norm = layer.final_layer_norm
        normed = _normed(self.x, norm)
        self._add_ffn(normed, layer.fc1, layer.fc2)
        return factors | {"fc1": self._smooth(norm, [layer.fc1], normed)}

    def _add_ffn(self, normed: torch.Tensor, fc1: nn.Linear, fc2: nn.Linear) -> None:
        outer = self.original(fc2).whole()  # its columns are asked for
        for start, weight in zip(
            range(0, fc1.out_features, _HIDDEN_AT_ONCE), self.original(fc1).parts(_HIDDEN_AT_ONCE), strict=True
        ):
            part = slice(start, start + _HIDDEN_AT_ONCE)
            hidden = gelu(normed @ weight.double().T + fc1.bias[part].double())
            self.x += hidden @ outer[:, part].double().T
        self.x += fc2.bias.double()

    def _product(self, rows: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        at_once = max(1, _AT_ONCE // linear.weight.shape[1])
        parts = [rows @ part.double().T for part in self.original(linear).parts(at_once)]
        return torch.cat(parts, dim=1) + linear.bias.double()

    def _smooth(self, norm: nn.LayerNorm, linears, rows: torch.Tensor) -> torch.Tensor:
        return smooth(norm, [(linear, self.original(linear)) for linear in linears], rows)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (rows.unflatten(1, (self.heads, -1)) for rows in (q, k, v))
        if self.rotary is not None:
            q, k = rotate(q, self.rotary), rotate(k, self.rotary)
        parts = [[rows[start:end].transpose(0, 1) for rows in (q, k, v)] for start, end in self.spans]
        return torch.cat([F.scaled_dot_product_attention(*part).transpose(0, 1) for part in parts]).flatten(1)


@torch.no_grad()
def smooth(norm: nn.LayerNorm, linears, rows: torch.Tensor) -> torch.Tensor:
    """Takes means and factors out of a layer norm; `linears`, each with the original of its matrix, read it, `rows`
    (n, width) are some of its results.

    Means go to the biases of `linears`. Returns the factors, for their matrices.
    """
    mean, size = rows.mean(0).nan_to_num(0, 0, 0), rows.square().mean(0).sqrt()
    mean = _coarse(torch.where(mean.abs() > _FAR * size.median(), mean, 0.0))
    bias = torch.where(mean == 0, norm.bias, (norm.bias.double() - mean).to(norm.bias.dtype))
    mean = norm.bias.double() - bias.double()
    moved = mean.nonzero()[:, 0]
    for linear, original in linears:
        columns = torch.cat(list(original.parts(columns=moved))) if len(moved) else mean.new_empty(len(linear.bias), 0)
        linear.bias.data = (linear.bias + columns.double() @ mean[moved]).to(linear.bias.dtype)
    largest = torch.zeros_like(mean)
    for part in (part for _, original in linears for part in original.parts()):
        for bound in torch.aminmax(part, dim=0):
            largest = torch.maximum(largest, bound.abs().double())
    size = (rows - mean).square().mean(0).sqrt()
    exponent = (torch.log2(size / largest) / 2).round().nan_to_num(0, 0, 0).clamp(-_EXPONENT, _EXPONENT)
    factor = torch.exp2(exponent).to(norm.weight.dtype)
    norm.weight.data, norm.bias.data = norm.weight.data / factor, bias / factor
    return factor


def _coarse(values: torch.Tensor) -> torch.Tensor:
    """To three binary digits."""
    unit = torch.exp2(torch.log2(values.abs()).floor() - 2).nan_to_num(1, 1, 1)
    return torch.where(values == 0, values, (values / unit).round() * unit)


def _normed(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    return layer_norm(x, norm.weight.double(), norm.bias.double(), norm.eps)
