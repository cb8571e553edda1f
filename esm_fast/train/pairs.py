"""Pairs of proteins with one label: what a head takes of the two, and how pairs are divided so that no protein leaks.

Each protein goes through the model once, whatever the number of its pairs. A head gets of the means u and v of the two,
ordered: [u, v, |u - v|, u v]; symmetric, the same for (a, b) and (b, a): [u + v, |u - v|, u v].
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..sequences.tokenize import Policy, Report, Tokens
from .examples import SPLITS, Example, ExamplesError, tokens_of

KINDS = ("ordered", "symmetric")
_PARTS = {"": 1, "ordered": 4, "symmetric": 3}


def width_of(kind: str, width: int) -> int:
    """Of what a head takes, where the model's is `width`. kind: one of KINDS, or "" for single proteins."""
    return _PARTS[kind] * width


def combined(kind: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(..., width) of the first proteins and of the second ones -> (..., width_of(kind, width))."""
    both = [(first - second).abs(), first * second]
    return torch.cat([first, second, *both] if kind == "ordered" else [first + second, *both], dim=-1)


def combined_rows(kind: str, means: np.ndarray, index: np.ndarray) -> np.ndarray:
    """means: float32 (proteins, width); index: (pairs, 2), their numbers. Single proteins stay as they are."""
    if not kind:
        return means
    first, second = (torch.from_numpy(means[index[:, side]]) for side in (0, 1))
    return combined(kind, first, second).numpy()


def proteins_of(
    examples: Sequence[Example], policy: Policy, report: Report
) -> tuple[list[Example], Tokens, np.ndarray]:
    """(the examples that the policy keeps; the tokens of their proteins; int64 (examples, 1 or 2), whose proteins those
    are). Of pairs each different protein is there once. Raises ExamplesError naming the place."""
    if not examples[0].partner:
        kept, tokens = tokens_of(examples, policy, report)
        return kept, tokens, np.arange(len(kept))[:, None]
    different = {}
    for example in examples:
        for which, sequence in zip(("first", "second"), example.proteins, strict=True):
            if sequence not in different:
                where = f"{example.place}: the {which} protein"
                different[sequence] = replace(example, sequence=sequence, partner="", where=where)
    there, tokens = tokens_of(list(different.values()), policy, report)
    number = {example.sequence: at for at, example in enumerate(there)}
    kept = [example for example in examples if all(sequence in number for sequence in example.proteins)]
    index = [[number[sequence] for sequence in example.proteins] for example in kept]
    return kept, tokens, np.array(index, dtype=np.int64).reshape(-1, 2)


def hashed(seed: int, name: str) -> bytes:
    """What orders proteins and clusters by chance, each by itself: others that come or go leave its place."""
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


class Held:
    """Which proteins (or clusters) each part holds out, and its pairs: all that have such a protein and are in no part
    before.

    numbers: int64 (pairs,), the part of each, -1 for none; touched: bool (parts, pairs), whether a pair has a protein
    that the part holds out. So what a part tests has a protein that is nowhere in the pairs it does not touch. A
    protein in more than 1 / count of the pairs, as the wild type of mutants, is never held out.
    """

    def __init__(self, examples: Sequence[Example], count: int, parts: int, seed: int, groups_of: Callable):
        members: dict[str, list[int]] = defaultdict(list)
        for number, example in enumerate(examples):
            for group in dict.fromkeys(groups_of(example)):
                members[group].append(number)
        most = -(-len(examples) // count)
        order = sorted(members, key=lambda group: hashed(seed, group))
        left = [group for group in order if len(members[group]) <= most]
        self.numbers = np.full(len(examples), -1)
        self.touched = np.zeros((parts, len(examples)), dtype=bool)
        for part in range(parts):
            later, taken = [], 0
            for group in left:
                own = [number for number in members[group] if self.numbers[number] < 0]
                if own and taken + len(own) <= most:
                    self.numbers[own], taken = part, taken + len(own)
                    self.touched[part, members[group]] = True
                else:
                    later.append(group)
            if not taken:
                raise ExamplesError(
                    f"{len(examples):,} pairs of {len(members):,} proteins cannot be divided by protein: those that "
                    f"are in at most {most:,} pairs are too few; give more pairs, or a column of splits"
                )
            left = later


def warnings_of(examples: Sequence[Example]) -> list[str]:
    """What held-out pairs share with training, with counts."""
    train = [example for example in examples if example.split == "train"]
    pairs, proteins = {frozenset(e.proteins) for e in train}, {sequence for e in train for sequence in e.proteins}
    found = []
    for split in SPLITS[1:]:
        held = [example for example in examples if example.split == split]
        known = [sum(sequence in proteins for sequence in example.proteins) for example in held]
        equal = [frozenset(example.proteins) in pairs for example in held]
        both = [number == 2 and not same for number, same in zip(known, equal, strict=True)]
        kinds = {
            f"pairs of {split} that are in train too": equal,
            f"pairs of {split} whose proteins are both in train, in other pairs": both,
            f"pairs of {split} with one protein that is in train": [number == 1 for number in known],
        }
        for text, which in kinds.items():
            if any(which):
                found.append(f"{text}: {sum(which):,} of {len(held):,}, such as {held[which.index(True)].place}")
    return found
