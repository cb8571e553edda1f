"""What the peers of the side-by-side runs share: the job, the weights, and how those that pad make their batches.

A builder takes a `Setup` and returns `run(job) -> float32 (n, embed_dim)`: mean-pooled last-layer embeddings in the
order of the job's proteins, tokenising included. Ours starts from the job's FASTA file, the peers from its strings.
Nothing is imported from a peer before its builder runs: one that is not installed costs the others nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

Proteins = list[tuple[str, str]]  # (label, residues), at most 1,022 residues each


@dataclass(frozen=True)
class Job:
    """Proteins to embed, and a FASTA file that holds the same."""

    proteins: Proteins
    fasta: Path

    @classmethod
    def write(cls, proteins: Proteins, fasta: Path) -> "Job":
        fasta.write_text("".join(f">{label}\n{residues}\n" for label, residues in proteins))
        return cls(proteins, fasta)


Run = Callable[[Job], np.ndarray]


@dataclass(frozen=True)
class Size:
    """The sizes that decide the cost; the defaults are ESM-1b's."""

    layers: int = 33
    embed_dim: int = 1280
    ffn_embed_dim: int = 5120
    attention_heads: int = 20
    max_positions: int = 1024

    def flops(self, lengths: np.ndarray) -> tuple[float, float]:
        """(GEMM, attention) floating-point operations for sequences of so many tokens, none of them padding."""
        gemm = 2 * lengths.sum() * self.layers * (4 * self.embed_dim**2 + 2 * self.embed_dim * self.ffn_embed_dim)
        return float(gemm), float(4 * self.layers * self.embed_dim * (lengths.astype(float) ** 2).sum())


TINY = Size(layers=2, embed_dim=32, ffn_embed_dim=64, attention_heads=2)


@dataclass(frozen=True)
class Setup:
    """What every peer is given: fp32 weights under fair-esm's names, the most tokens of a padded batch, and proteins
    outside the job for those that calibrate."""

    size: Size
    state: dict[str, torch.Tensor]
    batch_tokens: int
    calibration: Proteins


@dataclass(frozen=True)
class Peer:
    name: str
    dtype: str  # a key of DTYPES: the peak it is measured against, the tolerance it is held to
    needs: tuple[str, ...]  # modules that must be installed
    build: Callable[[Setup], Run]
    why_not: Callable[[], str] = lambda: ""  # what else keeps it from running here

    def missing(self) -> str:
        """Why it cannot take part, or nothing."""
        absent = [module for module in self.needs if find_spec(module) is None]
        return f"{', '.join(absent)}; pip install 'esm_fast[bench]'" if absent else self.why_not()


def padded_batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, longest first, in batches of at most so many tokens once padded to their first, which is the longest."""
    batch = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def in_padded_batches(setup: Setup, embed: Callable[[Proteins], np.ndarray]) -> Run:
    """Wrap a function of one batch of proteins into one of many, sorted by length to waste the least padding."""

    @torch.inference_mode()
    def run(job):
        proteins = job.proteins
        out = np.empty((len(proteins), setup.size.embed_dim), dtype=np.float32)
        for batch in padded_batches([len(residues) + 2 for _, residues in proteins], setup.batch_tokens):
            out[batch] = embed([proteins[i] for i in batch])
        return out

    return run


def mean_of_residues(hidden: torch.Tensor, proteins: Proteins) -> np.ndarray:
    """(B, T, E) of any floating dtype -> fp32 (B, E): the mean of each row without its cls, eos and padding."""
    rows = zip(hidden, proteins, strict=True)
    return torch.stack([row[1 : len(residues) + 1].float().mean(0) for row, (_, residues) in rows]).numpy()


def token_counts(proteins: Proteins) -> np.ndarray:
    """Tokens of each protein, <cls> and <eos> included."""
    return np.array([len(residues) + 2 for _, residues in proteins])
