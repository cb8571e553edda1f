"""Tile sizes, warps and pipeline stages of every kernel, per architecture.

A fixed table, never tuned on token counts: a row's bits must not depend on how many rows run beside it, and no batch
may stop for compilation. Every entry is compiled and audited for spills and shared memory; none was timed.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """tiles: the kernel's constexpr tile sizes by name."""

    tiles: dict[str, int]
    num_warps: int
    num_stages: int
