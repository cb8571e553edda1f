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


def attention_config(kernel: str, capability: int, dtype: torch.dtype, dim: int) -> Config:
    return Config(dict(BLOCK_Q=128, BLOCK_K=64), 4, 3)
