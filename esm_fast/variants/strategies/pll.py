"""pll: the pseudo-log-likelihood of the variant's protein, one pass a residue, each masked in turn (Salazar 2020).

The wild type's is that of the variant "="; what a variant changes is the difference.
"""

NAME, ALIASES = "pll", ("pseudo-ppl", "pseudo-log-likelihood")
WINDOW = "optimal"
LENGTHS = True
STOPS = MASKED = False


def add(sums, item: int, bound, proteins) -> None:
    """Sum over the variant's residues of log p(residue), the residue masked."""
    mutated = proteins(bound.sequence(proteins.wild_type.text))
    for at, residue in enumerate(mutated.text):
        sums.add(item, mutated, (at,), at, residue)


def add_compat(sums, item: int, bound, proteins) -> None:
    """As fair-esm's and ProteinGym's scripts have it: of tokens 1 to n - 2, each is masked, and asked for the residue
    behind it, since the index of a token is taken for that of a residue; the last two residues have no pass.
    """
    mutated = proteins(bound.sequence(proteins.wild_type.text))
    for at, residue in enumerate(mutated.text[1:-1]):
        sums.add(item, mutated, (at,), at, residue)
