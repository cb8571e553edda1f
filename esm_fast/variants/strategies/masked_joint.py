"""masked-joint: one pass a variant, with all its positions masked together (Meier et al. 2021, appendix A)."""

NAME, ALIASES = "masked-joint", ("masked_joint",)
WINDOW = "optimal"
LENGTHS = STOPS = False
MASKED = True


def add(sums, item: int, bound, proteins) -> None:
    """Sum over the changed positions of log p(mutant) - log p(wild type), all from one pass."""
    protein, changed = proteins.wild_type, bound.substitutions
    for at, residue in changed.items():
        sums.add(item, protein, tuple(changed), at, residue, protein.text[at])
