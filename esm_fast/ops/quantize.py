"""What a linear layer with 8-bit weights computes: integers within a group of inputs, fp32 from group to group.

Rows of activations and rows of weights are quantised alike, symmetrically, with a scale for every GROUP inputs: numbers
from -127 to 127, the largest magnitude of a group being 127. Weights are quantised once, activations row by row as they
come (dynamically), so nothing has to be calibrated, and a row's result does not depend on its neighbours.
"""

from typing import NamedTuple

import torch

from .common import accumulate_dtype

GROUP = 256
_TINIEST = 1e-30  # magnitudes too small to be divided by


class Quantized(NamedTuple):
    """numbers: (rows, n) int8; scales: (rows, groups). Number times scale is the value."""

    numbers: torch.Tensor
    scales: torch.Tensor

    def values(self) -> torch.Tensor:
        """The matrix, in the scales' dtype."""
        return self.numbers * self.scales.repeat_interleave(GROUP, dim=1)[:, : self.numbers.shape[1]]


def quantize(rows: torch.Tensor) -> Quantized:
    """Rows of any floating dtype, to the nearest of 255 numbers a group: fp64 in fp64, all else in fp32."""
    wide = rows.to(accumulate_dtype(rows.dtype))
    n, groups = rows.shape[1], -(-rows.shape[1] // GROUP)
    grouped = torch.nn.functional.pad(wide, (0, groups * GROUP - n)).unflatten(1, (groups, GROUP))
    largest = grouped.abs().amax(2)
    none = largest < _TINIEST
    inverse = torch.where(none, 0, torch.full_like(largest, 127) / largest)
    # A group with NaN or infinity keeps that as its scale, whatever its numbers are.
    numbers = (grouped * inverse[..., None]).round().nan_to_num(0, 127, -127).to(torch.int8)
    return Quantized(numbers.flatten(1)[:, :n].contiguous(), torch.where(none, 0, largest / 127))


def int8_linear(x: torch.Tensor, weight: Quantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (rows, in) times weight (out, in), transposed, plus bias; in x's dtype."""
    rows = quantize(x.detach())
    wide = rows.scales.dtype
    total = torch.zeros(len(x), len(weight.numbers), dtype=wide, device=x.device)
    for group, start in enumerate(range(0, x.shape[1], GROUP)):
        ours, theirs = (q.numbers[:, start : start + GROUP].to(wide) for q in (rows, weight))
        scale = torch.outer(rows.scales[:, group], weight.scales[:, group].to(wide))
        total += (ours @ theirs.T) * scale  # at most 256 * 127 * 127 < 2**24: exact in fp32
    return (total if bias is None else total + bias.to(wide)).to(x.dtype)
