"""Proteins that have relatives in the same file, for a nearest neighbour that means something.

Relatives share many words of 5 residues: unrelated proteins of 350 residues share 0.04 on average. Deterministic, and
quick for tens of thousands of proteins.
"""

import math
from collections import Counter, defaultdict

from common import Proteins

WORD = 5
SHARED = 10  # different words that two relatives share at least
MOST_SHARED = 0.9  # of the shorter one's words: beyond it they are copies
MEMBERS = 5  # of a family, at most
SHORTEST = 50  # residues; fragments say little


def with_relatives(proteins: Proteins, count: int) -> Proteins:
    """About `count` proteins, uncut: evenly spaced ones by label, and the closest relatives of each."""
    by_label = sorted(protein for protein in proteins if len(protein[1]) >= SHORTEST)
    words = [{residues[i : i + WORD] for i in range(len(residues) - WORD + 1)} for _, residues in by_label]
    holders = defaultdict(list)
    for i, own in enumerate(words):
        for word in own:
            holders[word].append(i)
    chosen = set()
    for seed in spread(len(by_label)):
        if len(chosen) >= count:
            break
        shared = Counter(i for word in words[seed] for i in holders[word] if i != seed)
        family = [seed]
        for i, number in sorted(shared.items(), key=lambda item: (-item[1], item[0])):
            few = min(len(words[seed]), len(words[i]))
            if number >= SHARED and number <= MOST_SHARED * few and len(family) < MEMBERS:
                family.append(i)
        if len(family) > 1:
            chosen |= set(family)
    return [by_label[i] for i in sorted(chosen)]


def spread(n: int) -> list[int]:
    """0 to n - 1 in an order in which every beginning is spread over the whole: steps of the golden section."""
    step = max(1, round(n * 0.6180339887))
    while n > 1 and math.gcd(step, n) > 1:
        step += 1
    return [i * step % n for i in range(n)]
