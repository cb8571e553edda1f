"""What a predictor says of proteins as a table: a row a protein, or a row a residue."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


ID_COLUMNS = (("id",), ("id_a", "id_b"))  # of single proteins, of pairs


@contextmanager
def table(path: Path, name: str, targets, more: Sequence[str] = (), *, ids: Sequence[str] = ("id",)):
    """Yields what takes a protein: (its names, one for each column of `ids`; its residues' ids or None; the head's
    outputs; the cells of the columns `more`, or a list of such, one a residue). The form is that of `name`'s ending."""
    import numpy as np

    from ..alphabet import TOKENS
    from ..variants.tables import writer

    first = [*ids, *(["position", "residue"] if targets.level == "residue" else [])]
    names, numbers = columns_of(targets)
    parquet = name.lower().endswith(".parquet")

    def add(own: Sequence[str], residues: "np.ndarray | None", outputs: "np.ndarray", extra: Iterator[list]) -> None:
        cells = values_of(targets, outputs)
        letters = None if residues is None else [TOKENS[i] for i in residues.tolist()]
        if letters and not parquet and not more and not np.isnan(outputs).any():
            return write.write(_lines(own, letters, cells, write.delimiter))
        if not parquet:
            cells = map(_texts, cells)
        columns = [[label] * len(outputs) for label in own]
        if letters is not None:
            columns += [map(float if parquet else str, range(1, len(outputs) + 1)), letters]
        rows = zip(*columns, *cells, strict=True)
        if more:
            rows = ([*row, *other] for row, other in zip(rows, extra, strict=True))
        if not parquet:
            return write.texts(rows)
        for row in rows:
            write(row)

    with writer(path, name.lower(), [*first, *names, *more], numbers | {"position"}) as write:
        yield add


def _lines(own: Sequence[str], letters: list[str], cells: list[list], delimiter: str) -> str:
    """All residues of a protein at once: csv, a cell at a time, took a tenth of what a small model does."""
    from ..variants.tables import quoted

    kinds = ["%.9g" if isinstance(column[0], float) else "%s" for column in cells]
    cells = [
        column if kind == "%.9g" else _quoted(column, delimiter) for kind, column in zip(kinds, cells, strict=True)
    ]
    start = [quoted(label, delimiter).replace("%", "%%") for label in own]
    line = delimiter.join([*start, "%d", "%s", *kinds]) + "\n"
    rows = zip(range(1, len(letters) + 1), letters, *cells, strict=True)
    return line * len(letters) % tuple(chain.from_iterable(rows))


def _quoted(column: list[str], delimiter: str) -> list[str]:
    from ..variants.tables import quoted

    known = {cell: quoted(cell, delimiter) for cell in set(column)}
    return [known[cell] for cell in column]


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
    for column, numbers in zip(targets.columns, targets.numbers(outputs), strict=True):
        if column.classes:
            columns.append([column.classes[best] for best in numbers.argmax(1).tolist()])
        columns += numbers.T.tolist() if column.classes else [numbers.tolist()]
    return columns
