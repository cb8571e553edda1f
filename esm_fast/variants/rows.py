"""Rows of tables to proteins and variants: each row is scored or has a reason why not, and stands where it stood."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from .bind import WILD_TYPE, Checked, Problem, between, check, explain, offset_for, require_protein
from .formats import Layout
from .parse import VariantError, parse
from .scores import Asked, Job

_TRUSTED = ("seq_id", "uniprot_id")  # columns that name proteins also where there is one protein only


@dataclass
class Group:
    """The rows of one protein."""

    name: str
    protein: str
    rows: list[int] = field(default_factory=list)
    texts: list = field(default_factory=list)  # variants; or (mutated protein, start) for tables of pairs
    mutated: list[int] = field(default_factory=list)  # hashes of mutated_sequence, where the table has it
    pairs: bool = False
    checked: Checked | None = None
    offset: int = 0


class Collection:
    """All rows of some tables, by protein; `problems` are those that lead to no protein."""

    def __init__(self, proteins: dict[str, str], *, protein_column: bool = False):
        self.proteins, self.strict = proteins, protein_column
        self.groups: dict[str, Group] = {}
        self.problems: list[Problem] = []
        self.count = 0
        self._texts: dict[str, str] = {}  # equal texts are one

    def add(self, columns: list[str], layout: Layout, rows: Iterable[list[str]]) -> None:
        trusted = layout.protein >= 0 and (self.strict or len(self.proteins) > 1 or columns[layout.protein] in _TRUSTED)
        for cells in rows:
            number, self.count = self.count, self.count + 1
            try:
                if layout.pairs is not None:
                    self._add_pair(number, [cells[at] for at in layout.pairs])
                    continue
                text = self._texts.setdefault(cells[layout.variant], cells[layout.variant])
                group = self._group(cells[layout.protein] if trusted else self._accession(text))
            except VariantError as error:
                self.problems.append(Problem(number, cells[layout.variant], error))
                continue
            group.rows.append(number)
            group.texts.append(text)
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

    def _group(self, name: str) -> Group:
        if name not in self.proteins:
            what = f"the FASTA has no protein {name!r}" if name else "nothing says which of the proteins it belongs to"
            raise VariantError("no protein", what)
        return self.groups.setdefault(name, Group(name, self.proteins[name]))

    def _add_pair(self, number: int, cells: list[str]) -> None:
        """wt_seq, mut_seq, start_pos."""
        try:
            wild_type, mutated, start = require_protein(cells[0]), require_protein(cells[1]), int(float(cells[2]))
        except (ValueError, OverflowError) as error:
            raise VariantError("not understood", str(error)) from None
        group = self.groups.setdefault(wild_type, Group(f"wt_seq of row {number + 1}", wild_type, pairs=True))
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
        return explain(
            problems, group.texts if group else [], group.protein if group else "X", group.offset if group else 0
        )


def _check_pairs(group: Group, job: Job) -> Checked:
    variants, of_row, problems, counts, known = [], [], [], Counter(), {}
    for row, pair in enumerate(group.texts):
        counts["duplicate"] += pair in known
        if pair not in known:
            bound = between(group.protein, pair[0])._replace(anchor=max(pair[1] - 1, 0))
            why = job.refuse(bound)
            known[pair] = VariantError("not for this strategy", why) if why else len(variants)
            if not why:
                variants.append(bound)
        found = known[pair]
        if isinstance(found, VariantError):
            problems.append(Problem(row, pair[0], found))
            counts[found.reason] += 1
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
