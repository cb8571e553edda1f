"""A variant on its protein: what it changes there, or why it does not fit; and the offset that would fit."""

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .parse import Edit, Variant, VariantError, parse, shown

_PROTEIN = frozenset("ACDEFGHIKLMNPQRSTVWYBXUZO")


class Change(NamedTuple):
    """Residues [start, end) of the protein, from 0, become `new`."""

    start: int
    end: int
    new: str


class Bound(NamedTuple):
    """A variant that fits its protein.

    changes: those that change something, in order; none for the wild type and for synonymous variants.
    stop: index of the residue that became a stop, or None.
    """

    changes: tuple[Change, ...]
    stop: int | None = None
    synonymous: bool = False  # changes were stated, and none of them changes anything
    anchor: int | None = None  # index of the residue a long protein is cut around, where a file gives it

    @property
    def substitutions(self) -> dict[int, str] | None:
        """{index: residue} where residues are only exchanged; None for other lengths and for stops."""
        if self.stop is not None or any(len(change.new) != change.end - change.start for change in self.changes):
            return None
        return {change.start + i: residue for change in self.changes for i, residue in enumerate(change.new)}

    def sequence(self, protein: str) -> str:
        """The variant's protein; up to the stop where there is one."""
        parts, at = [], 0
        for change in self.changes:
            parts += [protein[at : change.start], change.new]
            at = change.end
        return "".join(parts) + protein[at : len(protein) if self.stop is None else max(at, self.stop)]


WILD_TYPE = Bound(())


class MismatchError(VariantError):
    """The protein has another residue than the variant says."""

    def __init__(self, position: int, expected: str, found: str, text: str):
        super().__init__(
            "other wild type", f"{text}: position {position} is stated as {expected}, and the protein has {found}"
        )
        self.position, self.expected, self.found = position, expected, found


def require_protein(sequence: str) -> str:
    """The sequence as it is scored: upper case, without a final '*'. Raises ValueError."""
    if not isinstance(sequence, str):
        raise TypeError(f"the protein is a {type(sequence).__name__}: give its residues as a string")
    protein = "".join(sequence.split()).upper().removesuffix("*")
    if not protein:
        raise ValueError("the protein has no residues")
    if wrong := set(protein) - _PROTEIN:
        at = next(i for i, letter in enumerate(protein) if letter in wrong)
        gap = "; remove the gaps of an alignment first" if protein[at] in "-." else ""
        raise ValueError(f"column {at + 1}: {protein[at]!r} is not a residue whose variants can be scored{gap}")
    return protein


def bind(variant: Variant, protein: str, offset: int = 0, text: str = "") -> Bound:
    """Position p of the text is residue p - offset of the protein, from 1. Raises VariantError, MismatchError."""
    text = shown(text)
    changes, stop = [], None
    for edit in variant.edits:
        for position, residue in edit.stated:
            at = position - offset - 1
            if not 0 <= at < len(protein):
                first, last = 1 + offset, len(protein) + offset
                raise VariantError("out of range", f"{text}: position {position} is not among {first} to {last}")
            if protein[at] != residue:
                raise MismatchError(position, residue, protein[at], text)
        if edit.kind == "stop":
            stop = edit.start - offset - 1
        elif (change := _change(edit, protein, offset)) is not None:
            changes += _differences(change, protein)
    if stop is not None and len(variant.edits) > 1:
        raise VariantError("not supported", f"{text}: a stop together with other changes; give the stop alone")
    if stop is None and not Bound(tuple(changes)).sequence(protein):
        raise VariantError("not supported", f"{text}: nothing of the protein is left")
    return Bound(tuple(changes), stop, synonymous=bool(variant.edits) and not changes and stop is None)


def _change(edit: Edit, protein: str, offset: int) -> Change | None:
    start, end = edit.start - offset - 1, edit.end - offset
    if edit.kind == "equal":
        return None
    if edit.kind == "dup":
        return Change(end, end, protein[start:end])
    return Change(start, end, edit.new)


def _differences(change: Change, protein: str) -> list[Change]:
    """The change, or where the lengths are equal one for each residue that differs."""
    start, end, new = change
    if len(new) != end - start:
        return [change]
    return [Change(start + i, start + i + 1, r) for i, r in enumerate(new) if protein[start + i] != r]


def between(wild_type: str, mutated: str) -> Bound:
    """What makes one protein of the other: substitutions where the lengths are equal, else one stretch replaced."""
    if len(wild_type) == len(mutated):
        return Bound(tuple(_differences(Change(0, len(mutated), mutated), wild_type)))
    shortest, left, right = min(len(wild_type), len(mutated)), 0, 0
    while left < shortest and wild_type[left] == mutated[left]:
        left += 1
    while right < shortest - left and wild_type[-1 - right] == mutated[-1 - right]:
        right += 1
    return Bound((Change(left, len(wild_type) - right, mutated[left : len(mutated) - right]),))


class Offset(NamedTuple):
    """offset: subtracted from positions; fits: how many variants it fits, of all that could be read."""

    offset: int
    fits: int
    of: int
    ties: int  # how many other offsets fit as many


def best_offset(variants: Iterable[Variant], protein: str) -> Offset | None:
    """The offset that fits most variants; of several, the one nearest to 0. None where none fits any."""
    stated = Counter(tuple(pair for edit in v.edits for pair in edit.stated) for v in variants if v.edits)
    letters, votes = np.frombuffer(protein.encode(), np.uint8), _Votes()
    places = {letter: np.flatnonzero(letters == ord(letter)) for letter in set(protein)}
    for group, count in stated.items():
        fitting = [position - 1 - places.get(residue, places[protein[0]][:0]) for position, residue in group]
        votes.add(functools.reduce(np.intersect1d, fitting), count)
    offsets, counts = votes.result()
    if not len(counts):
        return None
    best = offsets[counts == counts.max()]
    nearest = best[np.argmin(np.abs(best))]
    return Offset(int(nearest), int(counts.max()), stated.total(), len(best) - 1)


def offset_for(offset: int | str, texts: Iterable[str], protein: str) -> int:
    """The offset, or for "auto" the one that fits most variants. Raises ValueError where that is not one alone."""
    if offset != "auto":
        try:
            return operator.index(offset)
        except TypeError:
            raise ValueError(f"offset is {offset!r}; give a whole number, or 'auto'") from None
    best = best_offset(readable(texts), protein)
    if best is None:
        raise ValueError("no offset fits any of the variants: is this the protein they were made of?")
    if best.ties and best.offset != 0:
        raise ValueError(
            f"{best.ties + 1} offsets fit {best.fits:,} of {best.of:,} variants, such as {best.offset}: give one"
        )
    return best.offset


class _Votes:
    """Counts of numbers that may lie far apart, in memory of the different ones."""

    _MANY = 1 << 20

    def __init__(self):
        self._numbers, self._counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        self._waiting = 0

    def add(self, numbers: np.ndarray, count: int) -> None:
        self._numbers.append(numbers)
        self._counts.append(np.full(len(numbers), count, np.int64))
        self._waiting += len(numbers)
        if self._waiting > self._MANY:
            numbers, counts = self.result()
            self._numbers, self._counts, self._waiting = [numbers], [counts], 0

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """The different numbers, ascending, and how often each was there."""
        numbers, place = np.unique(np.concatenate(self._numbers), return_inverse=True)
        counts = np.zeros(len(numbers), np.int64)
        np.add.at(counts, place, np.concatenate(self._counts))
        return numbers, counts


class Problem(NamedTuple):
    """A row that cannot be scored."""

    row: int  # from 0
    text: str
    error: VariantError


class Checked(NamedTuple):
    """Rows as they were read: each leads to a variant or is a problem; nothing is left out."""

    variants: list[Bound]  # the different ones, in the order they were met
    of_row: np.ndarray  # int64 (rows,): which of them a row has; -1 for a problem
    problems: list[Problem]
    counts: Counter  # rows, duplicate, wild type, synonymous, and each reason of a problem


def check(
    texts: Iterable[str], protein: str, offset: int = 0, refuse: Callable[[Bound], str] = lambda _: ""
) -> Checked:
    """Binds each row; equal texts are read once.

    refuse: says why a variant that fits its protein still cannot be scored, or "".
    """
    known: dict[str, int | VariantError] = {}
    variants, of_row, problems, counts = [], [], [], Counter()
    for row, text in enumerate(texts):
        text = "" if text is None or text != text else text  # NaN, as pandas reads an empty cell
        if not isinstance(text, str):
            raise TypeError(f"variant {row} is {text!r:.80}: variants are strings such as 'A1P'")
        counts["duplicate"] += text in known
        if text not in known:
            found = _bound_or_error(text, protein, offset, refuse)
            known[text] = found if isinstance(found, VariantError) else len(variants)
            if isinstance(found, Bound):
                variants.append(found)
        found = known[text]
        if isinstance(found, VariantError):
            problems.append(Problem(row, text, found))
            counts[found.reason] += 1
            of_row.append(-1)
            continue
        of_row.append(found)
        counts["synonymous"] += variants[found].synonymous
        counts["wild type"] += variants[found] == WILD_TYPE
    counts["rows"] = len(of_row)
    return Checked(variants, np.array(of_row, dtype=np.int64), problems, counts)


def _bound_or_error(text: str, protein: str, offset: int, refuse: Callable[[Bound], str]) -> Bound | VariantError:
    try:
        bound = bind(parse(text), protein, offset, text)
        if why := refuse(bound):
            raise VariantError("not for this strategy", f"{shown(text)}: {why}")
        return bound
    except VariantError as error:
        return error


def explain(
    problems: Sequence[Problem],
    texts: Sequence[str],
    protein: str,
    offset: int,
    listed: int = 3,
    where: Callable[[int], str] = lambda row: f"row {row + 1}",
) -> str:
    """What is wrong with which rows, and where it may help the offset that would fit most of them."""
    lines = [f"{where(problem.row)}: {problem.error}" for problem in problems[:listed]]
    if len(problems) > listed:
        lines.append(f"and {len(problems) - listed:,} more rows")
    said = "; ".join(lines)
    if any(problem.error.reason in ("other wild type", "out of range") for problem in problems):
        said += "; " + offset_advice(texts, protein, offset)
    return said


def offset_advice(texts: Sequence[str], protein: str, offset: int) -> str:
    """What another offset would do for the rows."""
    best = best_offset(readable(texts), protein)
    if best is None:
        return "no offset fits any of the rows: is this the protein they were made of?"
    if best.offset == offset:
        return f"no other offset fits more than {offset}, which fits {best.fits:,} of {best.of:,}"
    others = f" (the nearest of {best.ties + 1:,} that would: more rows would tell)" if best.ties else ""
    return f"offset={best.offset} would fit {best.fits:,} of {best.of:,} rows{others}"


def readable(texts: Iterable[str]) -> list[Variant]:
    variants = []
    for text in texts:
        try:
            variants.append(parse(text))
        except (VariantError, AttributeError):
            continue
    return variants
