"""wt: one pass over the wild type, nothing masked (Meier et al. 2021 `wt-marginals`; Brandes et al. 2023 LLR)."""

NAME, ALIASES = "wt", ("wt-marginals", "wild-type", "llr")
WINDOW = "brandes"
LENGTHS = STOPS = MASKED = False


def add(sums, item: int, bound, proteins) -> None:
    """Sum over the changed positions of log p(mutant) - log p(wild type)."""
    protein = proteins.wild_type
    for at, residue in bound.substitutions.items():
        sums.add(item, protein, (), at, residue, protein.text[at])
