"""The forms that tables of variants come in, told apart by their columns, and those that scans are written in."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from .parse import STANDARD, THREE_LETTERS, shown
from .tables import Table, TableError

BRANDES_ORDER = "KRHEDNQTSCGAVLIMPYFW"  # rows of esm-variants' matrix
_POSITION = re.compile(r"([A-Z]) ?(\d+)")
# The column with the variant, the one with its protein, and whose form it is.
_KNOWN = (
    ("mut_name", "seq_id", "esm-variants"),
    ("protein_variant", "uniprot_id", "AlphaMissense"),
    ("hgvs_pro", "", "MaveDB"),
    ("mutant", "", "ProteinGym or predict.py"),
    ("variant", "", ""),
    ("mutation", "", ""),
    ("mutations", "", ""),
    *((name, "", "") for name in ("variants", "mut", "substitution", "substitutions", "aa_change", "hgvs_p", "hgvsp")),
)
_PROTEINS = ("seq_id", "uniprot_id", "protein_id", "protein", "accession", "uniprot", "id")
PAIRS = ("wt_seq", "mut_seq", "start_pos")
MUTATED = "mutated_sequence"


class Layout(NamedTuple):
    """Where a table has what; -1 for what it has not.

    Without a column for variants, `mutated` has them: ProteinGym's tables of insertions and deletions.
    """

    variant: int
    protein: int = -1
    pairs: tuple[int, int, int] | None = None  # both sequences and where they begin to differ, instead of variants
    mutated: int = -1  # ProteinGym's mutated_sequence, which has to be what the variant makes


def layout_of(table: Table, variant: str | None = None, protein: str | None = None) -> Layout:
    """Raises TableError where no column holds variants, or several may.

    Names that are not given are found in any case: Mutant, HGVSp.
    """
    columns = table.columns
    if variant is None and all(_place(table, name) >= 0 for name in PAIRS):
        return Layout(-1, pairs=tuple(_place(table, name) for name in PAIRS))
    for name in (variant, protein):
        if name is not None and columns.count(name) != 1:
            what = f"{columns.count(name)} columns" if name in columns else "no column"
            raise TableError(f"{table.path} has {what} {name!r}; there are {', '.join(map(shown, columns))}")
    at = columns.index(variant) if variant is not None else _first(table, [name for name, *_ in _KNOWN])
    mutated = _place(table, MUTATED)
    if at < 0 and mutated < 0:
        known = ", ".join(name for name, *_ in _KNOWN)
        names = ", ".join(map(shown, columns[:8]))
        raise TableError(
            f"{table.path}: none of its columns ({names}) is one for variants ({known}, {MUTATED}); name it with "
            "--variant-col"
        )
    of_protein = columns.index(protein) if protein is not None else _first(table, _PROTEINS, but=at)
    return Layout(-1 if at == mutated else at, of_protein, mutated=mutated)


def _first(table: Table, names: Iterable[str], but: int = -1) -> int:
    """The place of the first of these columns that there is, but not that one; -1 for none."""
    return next((at for name in names if (at := _place(table, name)) >= 0 and at != but), -1)


def _place(table: Table, wanted: str) -> int:
    """The column of this name, or in another case; -1 for none."""
    same = [at for at, name in enumerate(table.columns) if name == wanted]
    same = same or [at for at, name in enumerate(table.columns) if name.strip().lower() == wanted]
    if len(same) > 1:
        raise TableError(f"{table.path} has {len(same)} columns {wanted!r}: rename those that are not meant")
    return same[0] if same else -1


class Matrix:
    """esm-variants' matrix of log-ratios, read as a table: a row for each substitution, column by column."""

    def __init__(self, table: Table):
        self.path, self.comments, self._table = table.path, table.comments, table
        self.columns = ["mut_name", "given_score"]

    def rows(self) -> Iterator[list[str]]:
        positions = [_POSITION.fullmatch(name) for name in self._table.columns[1:]]
        lines = list(self._table.rows())
        for place, found in enumerate(positions, start=1):
            for line in lines:
                yield [f"{found[1]}{found[2]}{line[0]}", line[place]]


def opened(path) -> "Table | Matrix":
    table = Table(path)
    names = table.columns[1:]
    return Matrix(table) if names and all(_POSITION.fullmatch(name) for name in names) else table


# ---- scans


def _single(protein: str, order: str) -> Iterator[tuple[int, str, str, int]]:
    """(position, wild type, mutant, column of the scan) of all 19 substitutions of each residue."""
    for i, own in enumerate(protein):
        yield from ((i + 1, own, new, STANDARD.index(new)) for new in order if new != own)


def _long(name: str, protein: str) -> Iterator[tuple[list[str], tuple[int, int]]]:
    for position, own, new, column in _single(protein, BRANDES_ORDER):
        yield [name, f"{own}{position}{new}"], (position - 1, column)


def _proteingym(name: str, protein: str) -> Iterator[tuple[list[str], tuple[int, int]]]:
    for position, own, new, column in _single(protein, STANDARD):
        mutated = f"{protein[: position - 1]}{new}{protein[position:]}"
        yield [name, f"{own}{position}{new}", mutated], (position - 1, column)


def _mavedb(name: str, protein: str) -> Iterator[tuple[list[str], tuple[int, int]]]:
    for position, own, new, column in _single(protein, STANDARD):
        yield [name, f"p.{THREE_LETTERS[own]}{position}{THREE_LETTERS[new]}"], (position - 1, column)


class Form(NamedTuple):
    """How a scan is written: the columns before the scores, the score's own name, and the rows."""

    columns: list[str]
    score: str
    rows: object  # (name, protein) -> (cells, (residue, column of the scan))


FORMS = {
    "long": Form(["seq_id", "mut_name"], "esm_score", _long),
    "proteingym": Form(["seq_id", "mutant", "mutated_sequence"], "esm_score", _proteingym),
    "mavedb": Form(["seq_id", "hgvs_pro"], "score", _mavedb),
    "alphamissense": Form(["uniprot_id", "protein_variant"], "esm_score", _long),
}


def matrix_rows(protein: str, scan: np.ndarray) -> tuple[list[str], Iterator[list]]:
    """Header and rows of esm-variants' matrix: a column a residue, a row a substitution."""
    header = ["", *(f"{own} {i + 1}" for i, own in enumerate(protein))]
    return header, ([new, *scan[:, STANDARD.index(new)].tolist()] for new in BRANDES_ORDER)
