"""Rows of tables to proteins and variants: each row is scored or has a reason why not, and stands where it stood."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from ..sequences.names import accession
from .bind import WILD_TYPE, Checked, Problem, between, check, explain, offset_for, require_protein
from .formats import PAIRS, Layout
from .parse import VariantError, parse, shown
from .scores import Asked, Job

_TRUSTED = ("seq_id", "uniprot_id")  # columns that name proteins also where there is one protein only


@dataclass
class Group:
    """The rows of one protein."""

    name: str
    protein: str
    rows: list[int] = field(default_factory=list)
    texts: list = field(default_factory=list)  # variants; or (mutated protein, start or None) for tables of pairs
    mutated: list[int] = field(default_factory=list)  # hashes of mutated_sequence, where the table has it
    pairs: bool = False
    checked: Checked | None = None
    offset: int = 0


def _whole(text: str) -> int:
    """A whole number, also as a program writes it that took its column for one of floats: 17.0."""
    number = float(text)
    if "_" in text or not number.is_integer():  # 1_7, which Python reads as 17
        raise ValueError(text)
    return int(number)


class Collection:
    """All rows of some tables, by protein; `problems` are those that lead to no protein."""

    def __init__(self, proteins: dict[str, str], *, protein_column: bool = False):
        self.proteins, self.strict = proteins, protein_column
        self.groups: dict[str, Group] = {}
        self.problems: list[Problem] = []
        self.count = 0
        self._texts: dict[str, str] = {}  # equal texts are one
        self._starts: list[int] = []  # the number of each table's first row
        self._tables: list[tuple[str, str]] = []  # their names, and of their columns with the variants

    def add(self, name: str, columns: list[str], layout: Layout, rows: Iterable[list[str]]) -> None:
        trusted = layout.protein >= 0 and (
            self.strict or len(self.proteins) > 1 or columns[layout.protein].strip().lower() in _TRUSTED
        )
        at = layout.variant if layout.variant >= 0 else layout.mutated if layout.pairs is None else layout.pairs[1]
        self._starts.append(self.count)
        self._tables.append((name, columns[at]))
        for cells in rows:
            number, self.count = self.count, self.count + 1
            try:
                self._add_row(number, cells, layout, trusted)
            except VariantError as error:
                self.problems.append(Problem(number, cells[at], error))

    def _add_row(self, number: int, cells: list[str], layout: Layout, trusted: bool) -> None:
        if layout.pairs is not None:
            self._add_pair(number, *(cells[at] for at in layout.pairs))
            return
        text = cells[layout.variant] if layout.variant >= 0 else ""
        name = self._known(cells[layout.protein].strip() if trusted else self._accession(text))
        if layout.variant < 0:
            self._add_pair(number, self.proteins[name], cells[layout.mutated])
            return
        group = self.groups.setdefault(name, Group(name, self.proteins[name]))
        group.rows.append(number)
        group.texts.append(self._texts.setdefault(text, text))
        if layout.mutated >= 0:
            group.mutated.append(hash(cells[layout.mutated].strip().upper()))

    def _accession(self, text: str) -> str:
        """The protein a row belongs to where no column says it."""
        if len(self.proteins) == 1:
            return next(iter(self.proteins))
        try:
            return parse(text).protein
        except VariantError:
            return ""

    def _known(self, name: str) -> str:
        """The protein's name in the FASTA."""
        if name not in self.proteins and accession(name) in self.proteins:  # sp|P04637|P53_HUMAN
            name = accession(name)
        if name not in self.proteins:
            unsaid = "nothing says which of the proteins it belongs to; name the column that does with --protein-col"
            raise VariantError("no protein", f"the FASTA has no protein {shown(name)!r}" if name else unsaid)
        return name

    def _add_pair(self, number: int, wild_type: str, mutated: str, start: str | None = None) -> None:
        """start: where a table says that the two begin to differ, which a long protein is cut around."""
        try:
            wild_type, mutated = require_protein(wild_type), require_protein(mutated)
        except ValueError as error:
            raise VariantError("not understood" if mutated.strip() else "empty", str(error)) from None
        try:
            start = None if start is None else _whole(start)
        except ValueError:
            raise VariantError("not understood", f"{PAIRS[2]} is {shown(start)!r}, and no whole number") from None
        group = self.groups.setdefault(f"pairs of {wild_type}", Group("wt_seq", wild_type, pairs=True))
        group.rows.append(number)
        group.texts.append((self._texts.setdefault(mutated, mutated), start))

    # ---- checking

    def check(self, job_of: Callable[[str], Job], offset: int | str) -> Counter:
        """Binds every row to its protein; counts them."""
        counts = Counter(rows=self.count)
        for group in self.groups.values():
            job = job_of(group.protein)
            if group.pairs:
                group.checked = _check_pairs(group, job)
            else:
                group.offset = offset_for(offset, group.texts, group.protein)
                group.checked = check(group.texts, group.protein, group.offset, job.refuse)
                if group.mutated:
                    group.checked = _check_mutated(group)
            counts.update({name: n for name, n in group.checked.counts.items() if name != "rows"})
        counts.update(problem.error.reason for problem in self.problems)
        return counts

    def all_problems(self) -> list[Problem]:
        """With the rows' numbers in the tables, ascending."""
        found = list(self.problems)
        for group in self.groups.values():
            found += [problem._replace(row=group.rows[problem.row]) for problem in group.checked.problems]
        return sorted(found, key=lambda problem: problem.row)

    def explain(self) -> str:
        """What is wrong, for a message: with the offset that would fit where all rows are of one protein."""
        problems = self.all_problems()
        group = next((g for g in self.groups.values() if g.checked.problems and not g.pairs), None)
        texts, protein, offset = (group.texts, group.protein, group.offset) if group else ([], "X", 0)
        return explain(problems, texts, protein, offset, where=self.where)

    def where(self, row: int) -> str:
        """How a message names a row: by its table, its number there, from 1 below the header, and the column."""
        table = bisect_right(self._starts, row) - 1
        name, column = self._tables[table]
        return f"{name}: row {row - self._starts[table] + 1}, column {shown(column)!r}"


def _check_pairs(group: Group, job: Job) -> Checked:
    variants, of_row, problems, counts, known = [], [], [], Counter(), {}
    for row, pair in enumerate(group.texts):
        counts["duplicate"] += pair in known
        if pair not in known:
            anchor = None if pair[1] is None else max(pair[1] - 1, 0)
            bound = between(group.protein, pair[0])._replace(anchor=anchor)
            why = job.refuse(bound)
            known[pair] = VariantError("not for this strategy", why) if why else len(variants)
            if not why:
                variants.append(bound)
        found = known[pair]
        if isinstance(found, VariantError):
            problems.append(Problem(row, pair[0], found))
            counts[found.reason] += 1
        else:
            counts["wild type"] += not variants[found].changes
        of_row.append(-1 if isinstance(found, VariantError) else found)
    return Checked(variants, np.array(of_row, np.int64), problems, counts)


def _check_mutated(group: Group) -> Checked:
    """mutated_sequence, where a row has one, has to be what its variant makes of the protein."""
    checked, of_row = group.checked, group.checked.of_row.copy()
    made = [hash(bound.sequence(group.protein)) for bound in checked.variants]
    problems, counts = list(checked.problems), checked.counts
    empty = hash("")
    for row, wanted in enumerate(group.mutated):
        if of_row[row] >= 0 and wanted not in (empty, made[of_row[row]]):
            error = VariantError(
                "other mutated_sequence", f"{group.texts[row]}: mutated_sequence is not what it makes of {group.name}"
            )
            problems.append(Problem(row, group.texts[row], error))
            counts[error.reason] += 1
            of_row[row] = -1
    return Checked(checked.variants, of_row, problems, counts)


def asked(collections: Iterable["Collection"], jobs: Iterable[Callable[[str], Job]]) -> list[Asked]:
    """What the rows want, of each strategy's collection protein by protein, with the wild type last."""
    return [
        Asked(job_of(group.protein), [*group.checked.variants, WILD_TYPE])
        for collection, job_of in zip(collections, jobs, strict=True)
        for group in collection.groups.values()
    ]


def by_row(collections: Iterable["Collection"], scores: Iterable[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores of what was `asked` -> float64 (rows,) scores and (rows,) of the wild types, of each collection.

    NaN for problems.
    """
    columns, scores = [], iter(scores)
    for collection in collections:
        own, wild_type = (np.full(collection.count, np.nan) for _ in range(2))
        for group in collection.groups.values():
            *found, base = next(scores)
            own[group.rows] = np.append(found, np.nan)[group.checked.of_row]
            wild_type[group.rows] = np.where(group.checked.of_row < 0, np.nan, base)
        columns.append((own, wild_type))
    return columns
