"""What the peers of the side-by-side runs share: the job, the weights, and how those that pad make their batches.

A builder takes a `Setup` and returns `run(job) -> float32 (n, embed_dim)`: mean-pooled last-layer embeddings in the
order of the job's proteins, tokenising included. Ours starts from the job's FASTA file, the peers from its strings.
Nothing is imported from a peer before its builder runs: one that is not installed costs the others nothing.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

Proteins = list[tuple[str, str]]  # (label, residues), at most 1,022 residues each


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Of a bench, whose docstring is a summary and, below it, examples."""
    summary, examples = doc.split("\n\n", 1)
    return argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


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
    """The sizes that decide the cost, and the family (a name of `esm_fast.models`); the defaults are ESM-1b's."""

    layers: int = 33
    embed_dim: int = 1280
    ffn_embed_dim: int = 5120
    attention_heads: int = 20
    max_positions: int = 1024  # of a family that has a table of them
    family: str = "esm1"

    @classmethod
    def of(cls, config) -> "Size":
        """Of a model's configuration, or of another package's arguments that are called as ours."""
        from esm_fast.models.family import of_config

        found = {field.name: getattr(config, field.name) for field in fields(cls) if hasattr(config, field.name)}
        return cls(**found | {"family": name_of(of_config(config))})

    def config(self):
        """The same sizes as our models take them."""
        from esm_fast.models.family import families

        config = families()[self.family].config
        return config(
            **{field.name: getattr(self, field.name) for field in fields(config) if hasattr(self, field.name)}
        )

    def flops(self, lengths: np.ndarray) -> tuple[float, float]:
        """(GEMM, attention) floating-point operations for sequences of so many tokens, none of them padding."""
        gemm = 2 * lengths.sum() * self.layers * (4 * self.embed_dim**2 + 2 * self.embed_dim * self.ffn_embed_dim)
        return float(gemm), float(4 * self.layers * self.embed_dim * (lengths.astype(float) ** 2).sum())


TINY = Size(layers=2, embed_dim=32, ffn_embed_dim=128, attention_heads=2)


def name_of(family) -> str:
    from esm_fast.models.family import families

    return next(name for name, found in families().items() if found is family)


@dataclass(frozen=True)
class Setup:
    """What every peer is given: fp32 weights under fair-esm's names, the most tokens of a padded batch, proteins
    outside the job for those that calibrate, and the Python in whose environment esm-cpp is installed."""

    size: Size
    state: dict[str, torch.Tensor]
    batch_tokens: int
    calibration: Proteins
    esm_cpp: Path | None = None


@dataclass(frozen=True)
class Peer:
    name: str
    dtype: str  # a key of DTYPES: the peak it is measured against, the tolerance it is held to
    needs: tuple[str, ...]  # modules that must be installed
    build: Callable[[Setup], Run]
    why_not: Callable[[Setup], str] = lambda setup: ""  # what else keeps it from running here
    output: str = "embeddings"  # or "logits": (n, tokens), the mean over the residues of a protein, which is verified

    def missing(self, setup: Setup) -> str:
        """Why it cannot take part, or nothing."""
        absent = [module for module in self.needs if find_spec(module) is None]
        return f"{', '.join(absent)}; pip install 'esm_fast[bench]'" if absent else self.why_not(setup)


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
        means = {}
        for batch in padded_batches([len(residues) + 2 for _, residues in proteins], setup.batch_tokens):
            means |= zip(batch, embed([proteins[i] for i in batch]), strict=True)
        return np.stack([means[i] for i in range(len(proteins))])

    return run


def mean_of_residues(hidden: torch.Tensor, proteins: Proteins) -> np.ndarray:
    """(B, T, E) of any floating dtype -> fp32 (B, E): the mean of each row without its cls, eos and padding."""
    rows = zip(hidden, proteins, strict=True)
    return torch.stack([row[1 : len(residues) + 1].float().mean(0) for row, (_, residues) in rows]).numpy()


def token_counts(proteins: Proteins) -> np.ndarray:
    """Tokens of each protein, <cls> and <eos> included."""
    return np.array([len(residues) + 2 for _, residues in proteins])
