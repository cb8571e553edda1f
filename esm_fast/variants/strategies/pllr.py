"""pllr: the ratio of the two proteins' log-likelihoods, one pass each, nothing masked (Brandes et al. 2023 PLLR).

It takes insertions and deletions. A stop is scored by the least log-ratio of all substitutions behind it, which
`scores` takes from a scan.
"""

from ..windows import crop

NAME, ALIASES = "pllr", ("pseudo-log-likelihood-ratio",)
WINDOW = "brandes"
LENGTHS = STOPS = True
MASKED = False


def add(sums, item: int, bound, proteins) -> None:
    """Sum of log p(residue) of the mutated protein, less that of the wild type."""
    if not bound.changes:
        return
    wild_type, mutated = _compared(bound, proteins)
    for text, sign in ((mutated, 1.0), (wild_type, -1.0)):
        part = proteins(text)
        for at, residue in enumerate(text):
            sums.add(item, part, (), at, residue, weight=sign)


def refuse(bound, proteins) -> str:
    """Why a variant cannot be scored, or ""."""
    if bound.stop is not None:
        behind = bound.stop + 1 < len(proteins.wild_type)
        return "" if behind else "nothing stands behind this stop that could be scored"
    if _compared(bound, proteins) is None:
        return "its changes are farther apart than one window of the model; give window='proteingym' or 'optimal'"
    return ""


def _compared(bound, proteins) -> tuple[str, str] | None:
    """The two proteins, or under `brandes` esm-variants' parts of long ones; None where those leave a change out."""
    wild_type, mutated = proteins.wild_type.text, bound.sequence(proteins.wild_type.text)
    if proteins.window != "brandes" or max(len(wild_type), len(mutated)) <= proteins.size:
        return wild_type, mutated
    first = bound.changes[0].start if bound.anchor is None else bound.anchor
    start, end, end_mutated = crop(len(wild_type), len(mutated), first, proteins.size)
    last = bound.changes[-1].end
    if bound.changes[0].start < start or last > end or last + len(mutated) - len(wild_type) > end_mutated:
        return None
    return wild_type[start:end], mutated[start:end_mutated]
