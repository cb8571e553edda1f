"""masked: one pass a position, with that position masked and all others wild type.

This is what fair-esm and ProteinGym compute as `masked-marginals`, also for several mutations.
"""

NAME, ALIASES = "masked", ("masked-marginals",)
WINDOW = "optimal"
LENGTHS = STOPS = False
MASKED = True


def add(sums, item: int, bound, proteins) -> None:
    """Sum over the changed positions of log p(mutant) - log p(wild type), each from its own pass."""
    protein = proteins.wild_type
    for at, residue in bound.substitutions.items():
        sums.add(item, protein, (at,), at, residue, protein.text[at])
