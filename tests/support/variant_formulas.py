"""The published scores of variants, written plainly over fair-esm's own model: one padded pass after the other.

Independent of esm_fast.variants: the tests compare the two. Positions count from 1; substitutions are (wild type,
position, mutant).
"""

import functools
import math

import numpy as np
import pytest
import torch

MASK, WIDTH = 32, 1024


@functools.cache
def alphabet():
    return pytest.importorskip("esm", reason="fair-esm is not installed").Alphabet.from_architecture("ESM-1b")


def tokens_of(model, sequence: str) -> torch.Tensor:
    """(1, T), with <cls> and <eos>."""
    return alphabet().get_batch_converter()([("", sequence)])[2]


@torch.no_grad()
def lp(model, tokens: torch.Tensor) -> torch.Tensor:
    """(T, 33) of one row of tokens."""
    return torch.log_softmax(model(tokens)["logits"], dim=-1)[0]


def index(model, residue: str) -> int:
    return alphabet().get_idx(residue)


def ratio(model, rows, mutation, at=None) -> float:
    """rows: (T, 33) of the whole protein's tokens, <cls> included; at: the row, where they are others."""
    wild_type, position, mutant = mutation
    row = rows[position if at is None else at]
    return float(row[index(model, mutant)] - row[index(model, wild_type)])


def wt(model, sequence, mutations) -> float:
    rows = lp(model, tokens_of(model, sequence))
    return sum(ratio(model, rows, mutation) for mutation in mutations)


def masked(model, sequence, mutations) -> float:
    total = 0.0
    for mutation in mutations:
        tokens = tokens_of(model, sequence)
        tokens[0, mutation[1]] = MASK
        total += ratio(model, lp(model, tokens), mutation)
    return total


def masked_joint(model, sequence, mutations) -> float:
    tokens = tokens_of(model, sequence)
    for _, position, _ in mutations:
        tokens[0, position] = MASK
    rows = lp(model, tokens)
    return sum(ratio(model, rows, mutation) for mutation in mutations)


def mutated(sequence, mutations) -> str:
    letters = list(sequence)
    for _, position, mutant in mutations:
        letters[position - 1] = mutant
    return "".join(letters)


def mutant(model, sequence, mutations) -> float:
    total = 0.0
    for mutation in mutations:
        tokens = tokens_of(model, mutated(sequence, mutations))
        tokens[0, mutation[1]] = MASK
        total += ratio(model, lp(model, tokens), mutation)
    return total


def pll(model, sequence) -> float:
    total = 0.0
    for i, residue in enumerate(sequence):
        tokens = tokens_of(model, sequence)
        tokens[0, i + 1] = MASK
        total += float(lp(model, tokens)[i + 1, index(model, residue)])
    return total


def pll_off_by_one(model, sequence) -> float:
    """fair-esm's compute_pppl."""
    total = 0.0
    for i in range(1, len(sequence) - 1):
        tokens = tokens_of(model, sequence)
        tokens[0, i] = MASK
        total += float(lp(model, tokens)[i, index(model, sequence[i])])
    return total


def likelihood(model, sequence) -> float:
    rows = lp(model, tokens_of(model, sequence))
    return sum(float(rows[i + 1, index(model, residue)]) for i, residue in enumerate(sequence))


# ---- proteins of more than 1,022 residues


def optimal_window(token: int, tokens: int, width: int = WIDTH) -> tuple[int, int]:
    if tokens <= width:
        return 0, tokens
    if token < width // 2:
        return 0, width
    if token >= tokens - width // 2:
        return tokens - width, tokens
    return token - width // 2, token + width // 2


def masked_optimal(model, sequence, mutation, masks=()) -> float:
    """One mutation, `masks` (positions) masked as well as its own."""
    tokens = tokens_of(model, sequence)
    for position in {mutation[1], *masks}:
        tokens[0, position] = MASK
    start, end = optimal_window(mutation[1], tokens.shape[1])
    return ratio(model, lp(model, tokens[:, start:end]), mutation, mutation[1] - start)


def brandes_parts(length: int) -> list[tuple[int, int]]:
    """(start, end) of the windows, by the recursion of esm-variants over an array of positions."""

    def cut(positions, parts):
        if len(positions) <= 1022:
            if parts[-2][-1] - parts[-1][0] < 512:
                middle = positions[len(positions) // 2]
                parts = [*parts, np.arange(middle - 511, middle + 511)]
            return parts
        return cut(positions[510:-510], [*parts, positions[:1022], positions[-1022:]])

    parts = cut(np.arange(length), [])
    return sorted((int(part[0]), int(part[-1]) + 1) for part in parts)


def brandes_weights(length: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The windows, and (windows, length) shares."""
    parts, ramp = brandes_parts(length), np.arange(256)
    table = np.zeros((len(parts), length))
    for number, (start, end) in enumerate(parts):
        share = np.ones(1022)
        if number > 0:
            share[:256] = 1 / (1 + np.exp(-(ramp - 128) / 20))
        if number < len(parts) - 1:
            share[-256:] = 1 / (1 + np.exp((ramp - 128) / 20))
        table[number, start:end] = share
    return parts, table / table.sum(axis=0)


def brandes_rows(model, sequence) -> np.ndarray:
    """(residues, 33)"""
    parts, shares = brandes_weights(len(sequence))
    total = np.zeros((len(sequence), 33))
    for (start, end), share in zip(parts, shares, strict=True):
        rows = lp(model, tokens_of(model, sequence[start:end])).double().numpy()[1:-1]
        total[start:end] += rows * share[start:end, None]
    return total


def proteingym_rows(model, sequence) -> np.ndarray:
    """(tokens, 33) of ProteinGym's overlapping windows."""
    tokens = tokens_of(model, sequence)
    count = tokens.shape[1]
    weights = np.ones(WIDTH)
    for i in range(1, 257):
        weights[i] = 1 / (1 + math.exp(-(i - 128) / 16))
    for i in range(1022 - 256, 1023):
        weights[i] = 1 / (1 + math.exp((i - 1022 + 128) / 16))
    total, share = np.zeros((count, 33)), np.zeros(count)

    def add(start):
        rows = lp(model, tokens[:, start : start + WIDTH]).double().numpy()
        total[start : start + WIDTH] += rows * weights[:, None]
        share[start : start + WIDTH] += weights

    left, right = 0, count - WIDTH
    while True:
        add(left)
        add(right)
        if left + WIDTH - 1 > right:
            break
        left, right = left + 511, right - 511
    if left + WIDTH - right < 511:
        add(count // 2 - 512)
    return total / share[:, None]


def cropped(wild_type: str, mutant_: str, first: int) -> tuple[str, str]:
    """esm-variants' parts of two proteins; first counts from 1."""
    left, difference = first - 1, len(wild_type) - len(mutant_)
    start = left - 511
    end_wild_type = left + 511 - min(start, 0) + min(difference, 0)
    end_mutant = left + 511 - min(start, 0) - max(difference, 0)
    start = max(start, 0)
    end_wild_type, end_mutant = min(end_wild_type, len(wild_type)), min(end_mutant, len(mutant_))
    if start > 0 and max(end_wild_type, end_mutant) - start < 1022:
        start = max(0, max(end_wild_type, end_mutant) - 1022)
    return wild_type[start:end_wild_type], mutant_[start:end_mutant]
