"""mutant: one pass a variant and position, that position masked, the variant's other mutations in place."""

NAME, ALIASES = "mutant", ("mutant-marginals", "mt-marginals")
WINDOW = "optimal"
LENGTHS = STOPS = False
MASKED = True


def add(sums, item: int, bound, proteins) -> None:
    """Sum over the changed positions of log p(mutant) - log p(wild type), each from its own pass."""
    wild_type = proteins.wild_type.text
    mutated = proteins(bound.sequence(wild_type))
    for at, residue in bound.substitutions.items():
        sums.add(item, mutated, (at,), at, residue, wild_type[at])
