"""One protein under one strategy: its variants' scores, its scan, its log-probabilities, on any model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..alphabet import TOKENS
from .bind import WILD_TYPE, Bound, Change
from .parse import STANDARD
from .plan import Known, Plan, Protein, Rows
from .strategies import strategy as strategy_named
from .windows import RESIDUES, WINDOWS, rule

_COLUMNS = [TOKENS.index(residue) for residue in STANDARD]
# Variants planned together: what one plan may hold of contexts (bytes) and of terms.
_PLAN_TOKENS, _PLAN_TERMS = 1 << 27, 1 << 22
_BATCHES_AHEAD = 8  # of small proteins that are scanned together


class Proteins:
    """A wild type and what is made of it, under one window and the lengths that one model takes."""

    def __init__(self, wild_type: str, window: str, longest: int | None):
        self.window, self.longest = window, longest
        self.size = RESIDUES if longest is None else min(RESIDUES, longest)
        self._rules: dict[int, Callable] = {}
        self._last: Protein | None = None
        self.wild_type = self(wild_type)

    def __call__(self, text: str) -> Protein:
        if self._last is None or self._last.text != text:
            if len(text) not in self._rules:
                self._rules[len(text)] = rule(self.window, len(text), self.longest)
            self._last = Protein(text, self._rules[len(text)])
        return self._last


class Job:
    """Variants of one protein under one strategy, for any number of models."""

    def __init__(self, wild_type: str, strategy: str, window: str = "auto", *, compat: bool = False):
        self.text, self.how = wild_type, strategy_named(strategy)
        self.window = self.how.WINDOW if window == "auto" else window
        if self.window not in WINDOWS:
            raise ValueError(f"window is {window!r}; choose one of auto, {', '.join(WINDOWS)}")
        self.add = getattr(self.how, "add_compat", self.how.add) if compat else self.how.add
        if compat and self.how.NAME == "masked" and self.window == "proteingym":
            raise ValueError("compat: ProteinGym's script has no masked marginals over overlapping windows")
        self._proteins: dict[int | None, Proteins] = {}

    def proteins(self, model) -> Proteins:
        longest = model.config.max_residues
        if longest not in self._proteins:
            self._proteins[longest] = Proteins(self.text, self.window, longest)
        return self._proteins[longest]

    def refuse(self, bound: Bound) -> str:
        """Why a variant has no score under this strategy, or ""."""
        if bound.stop is not None and not self.how.STOPS:
            return f"{self.how.NAME} has no score for a stop; pllr has"
        if bound.stop is None and bound.substitutions is None and not self.how.LENGTHS:
            return f"{self.how.NAME} has no score for another length; pllr and pll have"
        return self.how.refuse(bound, self._usual) if hasattr(self.how, "refuse") else ""

    @cached_property
    def _usual(self) -> Proteins:
        """For a model of the usual length; before a model is loaded, variants are checked against it."""
        return Proteins(self.text, self.window, None if self.window == "whole" else RESIDUES)

    # ---- whole proteins

    def rows_plan(self, model, masked: bool | tuple[int, ...]) -> Plan:
        """masked: whether each residue is in turn, or those that are together."""
        plan = Plan()
        self.add_rows(plan.rows(len(self.text)), 0, model, masked)
        return plan

    def add_rows(self, rows: Rows, first: int, model, masked: bool | tuple[int, ...]) -> None:
        """Those of all residues, as the items from `first` on."""
        protein = self.proteins(model).wild_type
        if masked is not True:
            rows.add_all(first, protein, masked or ())
            return
        for at in range(len(protein)):
            rows.add(first + at, protein, (at,), at)

    def log_probs(
        self,
        model,
        masked: bool | tuple[int, ...],
        budget: int,
        on_batch: Callable = lambda tokens: None,
        known: Known | None = None,
    ) -> np.ndarray:
        """float64 (residues, 33)"""
        (found,) = self.rows_plan(model, masked).run(model, budget, on_batch, known)
        return found

    def scan(
        self, model, budget: int, on_batch: Callable = lambda tokens: None, known: Known | None = None
    ) -> np.ndarray:
        """float64 (residues, 20): every substitution, less the wild type."""
        if not self.how.LENGTHS:
            return ratios_of(self.log_probs(model, self.how.MASKED, budget, on_batch, known), self.text)
        variants = [Bound((Change(at, at + 1, new),)) for at in range(len(self.text)) for new in STANDARD]
        variants = [WILD_TYPE if self.text[v.changes[0].start] == v.changes[0].new else v for v in variants]
        (scores,) = scores_of(model, [Asked(self, [*variants, WILD_TYPE])], budget, on_batch, known)
        return (scores[:-1] - scores[-1]).reshape(-1, len(STANDARD))


# ---- variants


class Asked(NamedTuple):
    """Variants of a job's protein."""

    job: Job
    variants: list[Bound]


class Part:
    """What is planned together: sums of variants, and the scans of wild types that have stops."""

    def __init__(self, count: int):
        self.plan = Plan()
        self.sums = self.plan.sums(count)
        self.numbers: list[int] = []  # of the variants, counted through all that are asked for
        self.stops: list[tuple[Job, list[tuple[int, int]]]] = []  # with their numbers, and where they stop

    @property
    def is_full(self) -> bool:
        return self.plan.tokens > _PLAN_TOKENS or len(self.sums) > _PLAN_TERMS

    def add(self, number: int, bound: Bound, job: Job, proteins: Proteins) -> None:
        job.add(self.sums, len(self.numbers), bound, proteins)
        self.numbers.append(number)

    def add_stops(self, stops: list[tuple[int, int]], job: Job, model) -> None:
        self.stops.append((job, stops))
        job.add_rows(self.plan.rows(len(job.text)), 0, model, masked=False)

    def run(self, model, scores: np.ndarray, budget: int, on_batch: Callable, known: Known | None) -> None:
        """Writes the variants' scores to their numbers."""
        sums, *rows = self.plan.run(model, budget, on_batch, known)
        scores[self.numbers] = sums[: len(self.numbers)]
        for (job, stops), log_probs in zip(self.stops, rows, strict=True):
            ratios = ratios_of(log_probs, job.text)
            for number, at in stops:
                scores[number] = ratios[at + 1 :].min()


def parts_of(model, asked: Sequence[Asked]) -> Iterator[Part]:
    """All that is asked for, planned in parts that memory has room for; one after another, in order of positions.

    So variants that share contexts stand together, whatever the order they are asked for in.
    """
    total, first = sum(len(variants) for _, variants in asked), 0
    part = Part(total)
    for job, variants in asked:
        proteins = job.proteins(model)
        stops = [(first + i, bound.stop) for i, bound in enumerate(variants) if bound.stop is not None]
        if stops:
            part.add_stops(stops, job, model)
        for i in sorted(range(len(variants)), key=lambda i: variants[i].changes):
            if variants[i].stop is None:
                part.add(first + i, variants[i], job, proteins)
            if part.is_full:
                yield part
                part = Part(total)
        first += len(variants)
    if part.numbers or part.stops:
        yield part


def scores_of(
    model,
    asked: Sequence[Asked],
    budget: int,
    on_batch: Callable = lambda tokens: None,
    known: Known | None = None,
) -> list[np.ndarray]:
    """float64 (variants,) of each. Contexts that several want are computed once, and those of all share batches."""
    known = Known() if known is None else known
    scores = np.zeros(sum(len(variants) for _, variants in asked))
    for part in parts_of(model, asked):
        part.run(model, scores, budget, on_batch, known)
    return np.split(scores, np.cumsum([len(variants) for _, variants in asked])[:-1])


# ---- many proteins


def scans(
    model, texts: Iterable[str], strategy: str, window: str, budget: int, on_batch: Callable = lambda tokens: None
) -> Iterator[np.ndarray]:
    """The scan of each protein, as `Job.scan`; small ones share batches, which does not show in the numbers."""
    group: list[Job] = []
    for text in texts:
        job = Job(text, strategy, window)
        if job.how.LENGTHS:
            yield job.scan(model, budget, on_batch)
            continue
        group.append(job)
        if sum(len(job.text) ** (1 + job.how.MASKED) for job in group) > _BATCHES_AHEAD * budget:
            yield from _scanned(model, group, budget, on_batch)
            group = []
    yield from _scanned(model, group, budget, on_batch)


def _scanned(model, jobs: list[Job], budget: int, on_batch: Callable) -> Iterator[np.ndarray]:
    if not jobs:
        return
    plan, ends = Plan(), np.cumsum([len(job.text) for job in jobs])
    rows = plan.rows(int(ends[-1]))
    for job, end in zip(jobs, ends.tolist(), strict=True):
        job.add_rows(rows, end - len(job.text), model, job.how.MASKED)
    (found,) = plan.run(model, budget, on_batch)
    for job, part in zip(jobs, np.split(found, ends[:-1]), strict=True):
        yield ratios_of(part, job.text)


def ratios_of(log_probs: np.ndarray, protein: str) -> np.ndarray:
    """(residues, 20) log p(substitution) - log p(wild type), columns in the order of STANDARD."""
    own = log_probs[np.arange(len(protein)), [TOKENS.index(residue) for residue in protein]]
    return log_probs[:, _COLUMNS] - own[:, None]
