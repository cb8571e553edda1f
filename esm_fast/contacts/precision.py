"""Precision of the most probable contacts, by how far apart the residues are: P@L, P@L/2, P@L/5."""

import numpy as np

from .structures import Structure

RANGES = {"short": (6, 11), "medium": (12, 23), "long": (24, None)}  # residues apart, both ends included
PARTS = (1, 2, 5)


def precisions(contacts: np.ndarray, structure: Structure) -> dict[str, dict[str, float]]:
    """For each range, the share that is true of the L, L/2 and L/5 most probable pairs, and of all ("any").

    contacts: (residues, residues) probabilities. Pairs with a residue that was not seen are left out; L is the length
    of the sequence, and where there are fewer pairs it is their number. NaN for a range that has no pair.
    """
    found = {}
    true, seen, length = structure.contacts, structure.seen, len(structure.sequence)
    for name, (low, high) in RANGES.items():
        first, second = np.triu_indices(length, low)
        kept = seen[first] & seen[second] & (second - first <= (high or length))
        first, second = first[kept], second[kept]
        hits = true[first, second][np.argsort(-contacts[first, second], kind="stable")]
        found[name] = {f"L/{part}".removesuffix("/1"): _mean(hits[: max(1, length // part)]) for part in PARTS}
        found[name]["any"] = _mean(hits)
    return found


def mean(all_of: list[dict]) -> dict[str, dict[str, float]]:
    """Over proteins, each as much as another."""
    return {
        name: {part: _mean(np.array([one[name][part] for one in all_of])) for part in all_of[0][name]}
        for name in RANGES
    }


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return float(values.mean()) if len(values) else float("nan")
