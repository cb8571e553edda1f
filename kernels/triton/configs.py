"""Tile sizes, warps and pipeline stages of every kernel, per architecture.

A fixed table, never tuned on token counts: a row's bits must not depend on how many rows run beside it, and no batch
may stop for compilation. Every entry is compiled and audited for spills and shared memory; none was timed.
"""

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """tiles: the kernel's constexpr tile sizes by name."""

    tiles: dict[str, int]
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}


# Half precision on the tensor cores of sm_80, and of sm_86, 89 and 120, which have less shared memory. Tiles of 64
# queries leave two or more blocks an SM and waste little on the last tile of a protein of 300 residues.
# Keyed by kernel and by the head size it is enough for; (a program's own tile, that of the other side, warps, stages).
_ATTENTION = {
    ("attention_forward", 64): (64, 64, 4, 2),
    ("attention_forward", 128): (64, 32, 4, 3),
    ("attention_backward", 64): (64, 32, 4, 2),
    ("attention_backward", 128): (64, 32, 8, 2),
}
# wgmma (sm_90) and tcgen05 (sm_100) read their operands from shared memory, so larger tiles fit.
_ATTENTION_BY_ARCH = {
    90: {
        ("attention_forward", 64): (128, 64, 4, 3),
        ("attention_forward", 128): (128, 64, 8, 2),
        ("attention_backward", 64): (64, 64, 4, 2),
    },
    100: {
        ("attention_forward", 64): (128, 64, 4, 3),
        ("attention_forward", 128): (128, 64, 8, 2),
        ("attention_backward", 64): (64, 64, 4, 2),
        ("attention_backward", 128): (64, 32, 8, 1),
    },
}
# fp32 without tf32 is multiplied without tensor cores, with operands in registers: small tiles.
_ATTENTION_FP32 = {
    ("attention_forward", 64): (32, 32, 8, 2),
    ("attention_forward", 128): (32, 32, 8, 1),
    ("attention_backward", 64): (32, 32, 8, 1),
    ("attention_backward", 128): (16, 16, 8, 2),
}


def attention_config(kernel: str, capability: int, dtype: torch.dtype, dim: int) -> Config:
    """dim: the padded head size."""
    half = {**_ATTENTION, **_ATTENTION_BY_ARCH.get(capability, {})}
    table = _ATTENTION_FP32 if dtype == torch.float32 else half
    own, other, warps, stages = table[kernel, 64 if dim <= 64 else 128]
    return Config(dict(BLOCK=own, INNER=other), warps, stages)


_WIDE = (90, 100)  # wgmma and tcgen05, with 227 KiB of shared memory a block
_TWO_BLOCKS = ("linear_gelu", "qkv_projection", "input_grad")  # an SM holds two, where their tiles leave the room


def linear_config(kernel: str, capability: int, dtype: torch.dtype) -> Config:
    """The tile of the products; a backward with two accumulators has half a tile, or twice the warps, for each. In fp32
    `input_grad` has one stage, five blocks an SM: with more its operands would not fit in the registers.

    A fourth stage pays where registers leave one block an SM anyway; with three, 98,304 bytes, two fit.
    """
    two = kernel == "gelu_ffn_backward"
    if dtype == torch.float32:
        return Config(dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32), 8 if two else 4, 1 if kernel == "input_grad" else 3)
    stages = 4 if capability in _WIDE and kernel not in _TWO_BLOCKS else 3
    return Config(dict(BLOCK_M=128, BLOCK_N=64 if two else 128, BLOCK_K=64), 8, stages)
