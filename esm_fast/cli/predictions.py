"""What a predictor says of proteins as a table: a row a protein, or a row a residue."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@contextmanager
def table(path: Path, name: str, targets, more: Sequence[str] = ()):
    """Yields what takes a protein: (the cells of its first columns, its residues' ids or None, the head's outputs,
    the cells of the columns `more`, or a list of such, one a residue). The form is that of `name`'s ending."""
    from ..alphabet import TOKENS
    from ..variants.tables import writer

    first = ["id", *(["position", "residue"] if targets.level == "residue" else [])]
    names, numbers = columns_of(targets)
    parquet = name.lower().endswith(".parquet")

    def add(name: str, ids: "np.ndarray | None", outputs: "np.ndarray", extra: Iterator[list]) -> None:
        for at, (values, other) in enumerate(zip(values_of(targets, outputs), extra, strict=True)):
            place = [name] if ids is None else [name, float(at + 1) if parquet else str(at + 1), TOKENS[ids[at]]]
            write([*place, *(values if parquet else map(_text, values)), *other])

    with writer(path, name.lower(), [*first, *names, *more], numbers | {"position"}) as write:
        yield add


def _text(cell) -> str:
    if isinstance(cell, float):
        return "" if cell != cell else f"{cell:.9g}"
    return cell


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


def values_of(targets, outputs: "np.ndarray") -> Iterator[list]:
    """The cells of each row of (rows, targets.outputs)."""
    from ..train.sets import label_of

    if targets.separator:
        (labels,), (numbers,) = targets.labels(outputs), targets.probabilities(outputs)
        rows = zip(labels, numbers.tolist(), strict=True)
        return ([label_of(found, targets.separator), *chances] for found, chances in rows)
    parts = []
    for column, numbers, labels in zip(targets.columns, targets.numbers(outputs), targets.labels(outputs), strict=True):
        more = numbers.tolist() if column.classes else [[]] * len(labels)
        parts.append([[label, *own] for label, own in zip(labels, more, strict=True)])
    return ([cell for part in row for cell in part] for row in zip(*parts, strict=True))
