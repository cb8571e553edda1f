"""Embedding proteins: a stream of them in, an array a layer of each out, in input order."""

import os
from collections.abc import Iterable, Iterator
from numbers import Integral
from pathlib import Path

import numpy as np

from ..models.encoder import Encoder
from ..sequences.fasta import Records, read_fasta, records_from
from ..sequences.tokenize import Policy, Report, Tokens, tokenize
from .outputs import make, pools
from .stream import run

BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_MOST_TOKENS = 2**62


def embed(
    model: Encoder,
    sequences,
    *,
    layers=(-1,),
    pool="mean",
    batch_tokens=None,
    unknown="error",
    empty="error",
    overlength="error",
    report: Report | None = None,
) -> Iterator[tuple[str, "Layers"]]:
    """Embeds proteins and yields (label, {layer: array}) in input order, as they are ready.

    Memory is bounded by the token budget, not by the input: sequences may be an endless stream.

    Args:
        model: from `load`.
        sequences: a FASTA path ("-" for standard input; plain, gz, bz2, xz or zst) or an open binary file; or an
            iterable of strings or (label, string) pairs.
        layers: 0 (the embedding) to the number of layers; negative numbers count from the last, -1.
        pool: "mean", "max" or "std" over the residues, column by column (<cls> and <eos> never enter it; std is the
            population's: divided by the number of residues), "cls", or "per_residue".
        batch_tokens: tokens in one batch, <cls> and <eos> included; default 4,096 on a CPU, 16,384 on a GPU.
        unknown: for residues ESM-1b does not know: "error", "x" (read as X) or "skip" (leave the record out).
        empty: for records without residues: "error" or "skip".
        overlength: for proteins over the model's limit, 1,022 residues in ESM-1b; ESM-2 has none, runs them whole with
            "error", and cuts at 1,022 with the others. "error", "truncate" (as fair-esm), or "window":
            windows of 1,022 overlapping by half, averaged per residue (max: the largest of all). Windows are our
            choice, not ESM-1b's.
        report: a `Report` to count into.

    Yields:
        (label, {layer: float32 array}): shape (embed_dim,), or (residues, embed_dim) for "per_residue".

    Raises:
        ValueError: for arguments; FastaError: for the input, naming file, record and column.
    """
    wanted = layer_numbers(model, layers)
    if not wanted:
        raise ValueError("layers is empty: ask for at least one, such as (-1,)")
    if pool not in pools():
        raise ValueError(f"pool is {pool!r}; choose one of {', '.join(pools())}")
    budget = token_budget(model, batch_tokens)
    limit = model.config.limit(overlength)
    policy = Policy(unknown=unknown, empty=empty, overlength=overlength, max_residues=limit)
    report = Report() if report is None else report
    tokens = (tokenize(records, policy, report) for records in _records(sequences))
    return _embed(model, tokens, wanted, pool, budget, policy.window)


def _embed(model: Encoder, tokens: Iterable[Tokens], layers: list[int], pool: str, budget: int, window: int | None):
    for protein in run(model, tokens, [make(pool, layer) for layer in layers], budget, window=window):
        arrays = dict(zip(layers, protein.arrays, strict=True))
        yield protein.label, Layers(arrays, model.config.layers)


def layer_numbers(model: Encoder, layers: Iterable[int]) -> list[int]:
    """The layers asked for, each once, ascending, negative ones counted from the last. Raises ValueError."""
    return sorted({_layer_number(layer, model.config.layers) for layer in layers})


def token_budget(model: Encoder, batch_tokens: int | None) -> int:
    """batch_tokens, or the default of the model's device for None. Raises ValueError, TypeError."""
    if batch_tokens is None:
        return BATCH_TOKENS.get(model.device.type, 4096)
    if not isinstance(batch_tokens, Integral) or isinstance(batch_tokens, bool):
        raise TypeError(f"batch_tokens must be a whole number or None, not {type(batch_tokens).__name__}")
    if not 1 <= batch_tokens <= _MOST_TOKENS:
        raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least 1, and at most {_MOST_TOKENS}")
    return batch_tokens


class Layers(dict):
    """{layer number: array}, in which negative numbers count from the last layer, as in the request."""

    def __init__(self, arrays: dict[int, np.ndarray], depth: int):
        super().__init__(arrays)
        self._depth = depth

    def __missing__(self, layer: int) -> np.ndarray:
        if isinstance(layer, int) and layer < 0 and (number := layer + self._depth + 1) in self:
            return self[number]
        raise KeyError(layer)


def _records(sequences) -> Iterator[Records]:
    if isinstance(sequences, str) and sequences != "-" and not Path(sequences).exists():
        raise FileNotFoundError(f"no such FASTA file: {sequences!r} (to embed one protein, give a list: [sequence])")
    if isinstance(sequences, str | os.PathLike) or hasattr(sequences, "read"):
        return read_fasta(sequences)
    return records_from(sequences)


def _layer_number(layer: int, depth: int) -> int:
    if not -(depth + 1) <= layer <= depth:
        raise ValueError(
            f"layer {layer} does not exist: the model has 0 (the embedding) to {depth}, or -1 to {-depth - 1}"
        )
    return layer % (depth + 1)
