"""What a predictor says of proteins as a table: a row a protein, or a row a residue."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


ID_COLUMNS = (("id",), ("id_a", "id_b"))  # of single proteins, of pairs


@contextmanager
def table(path: Path, name: str, targets, more: Sequence[str] = (), *, ids: Sequence[str] = ("id",)):
    """Yields what takes a protein: (its names, one for each column of `ids`; its residues' ids or None; the head's
    outputs; the cells of the columns `more`, or a list of such, one a residue). The form is that of `name`'s ending."""
    from ..alphabet import TOKENS
    from ..variants.tables import writer

    first = [*ids, *(["position", "residue"] if targets.level == "residue" else [])]
    names, numbers = columns_of(targets)
    parquet = name.lower().endswith(".parquet")

    def add(own: Sequence[str], residues: "np.ndarray | None", outputs: "np.ndarray", extra: Iterator[list]) -> None:
        cells = values_of(targets, outputs)
        if not parquet:
            cells = map(_texts, cells)
        labels = [[label] * len(outputs) for label in own]
        if residues is None:
            columns = [*labels, *cells]
        else:
            positions = map(float if parquet else str, range(1, len(outputs) + 1))
            columns = [*labels, positions, [TOKENS[i] for i in residues.tolist()], *cells]
        rows = zip(*columns, strict=True)
        if more:
            rows = ([*row, *other] for row, other in zip(rows, extra, strict=True))
        if not parquet:
            return write.texts(rows)
        for row in rows:
            write(row)

    with writer(path, name.lower(), [*first, *names, *more], numbers | {"position"}) as write:
        yield add


def _texts(cells: list) -> list[str]:
    """Of a column: nothing for a number that is not there."""
    if cells and isinstance(cells[0], float):
        return ["" if cell != cell else f"{cell:.9g}" for cell in cells]
    return cells


def columns_of(targets) -> tuple[list[str], set[str]]:
    """(the names of a prediction's columns, which of them hold numbers).

    Of numbers: the label's own name. Of classes: that for the class, and for each class its probability, p_CLASS (of
    several labels LABEL_p_CLASS). Multi-label: the classes that are there, separated, and for each p_CLASS.
    """
    names, numbers = [], set()
    if targets.separator:
        own = [f"p_{column.name}" for column in targets.columns]
        return [targets.name, *own], set(own)
    for column in targets.columns:
        names.append(column.name)
        prefix = f"{column.name}_" if len(targets.columns) > 1 else ""
        own = [f"{prefix}p_{name}" for name in column.classes]
        names += own
        numbers |= set(own) if column.classes else {column.name}
    return names, numbers


def values_of(targets, outputs: "np.ndarray") -> list[list]:
    """The cells of each of these columns, of a head's (rows, targets.outputs)."""
    from ..train.sets import label_of

    if targets.separator:
        (labels,), (numbers,) = targets.labels(outputs), targets.probabilities(outputs)
        return [[label_of(found, targets.separator) for found in labels], *numbers.T.tolist()]
    columns = []
    for column, numbers, labels in zip(targets.columns, targets.numbers(outputs), targets.labels(outputs), strict=True):
        columns += [labels, *(numbers.T.tolist() if column.classes else [])]
    return columns
