"""Log-ratio tables of whole proteomes: a data set, whose numbers of a residue are the 20 scores of its scan.

It is planned, committed, resumed, shared and verified as one of embeddings is; `Settings.scan` tells the two apart.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..dataset import layout, ranks
from ..dataset.build import (
    Built,
    Options,
    exact,
    finished,
    loaded,
    loader,
    planned,
    require_folder,
    work_on,
)
from ..dataset.compute import NONFINITE, OVERFLOW
from ..dataset.reader import Dataset
from ..dataset.units import Results, Unit
from ..dataset.worker import Progress
from .bind import bind, require_protein
from .parse import STANDARD, VariantError, parse, shown
from .scores import Job, scans

LAYER = 0  # the name of the numbers in a data set's files
UNSCORED = "holds gaps or masks"
_ADDITIVE = ("wt", "masked")  # whose scores of several substitutions are sums of those of single ones


def build_atlas(
    inputs,
    folder: str | Path,
    *,
    model: str | Path,
    strategy: str = "wt",
    window: str = "auto",
    shard: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    load: Callable | None = None,
    **options,
) -> Built:
    """Scores every substitution of every protein, or resumes where a run left off.

    Args:
        inputs, folder, model, shard, on_progress: as for `esm_fast.build_dataset`.
        strategy, window: as for `esm_fast.variants.scan`; "wt" and "masked" have tables.
        load: loads the model in the type it is given. options: the other fields of `dataset.build.Options`.
    """
    options = {"store": "float16", "overlength": "window"} | options
    asked = Options(inputs, folder, model, **options)
    require_folder(asked.folder)
    job = Job("A", strategy, window)
    if job.how.NAME not in _ADDITIVE:
        raise ValueError(f"tables are made for {' and '.join(_ADDITIVE)}, and not for {job.how.NAME}")
    share, load, progress = ranks.share(shard), load or loader(asked), Progress()

    def note(stage: str) -> Callable:
        return lambda *_: on_progress(progress.at(stage))

    scorer, settings = loaded(asked, load)
    settings = replace(
        settings,
        layers=(LAYER,),
        width=len(STANDARD),
        pool="mean",
        residues=True,
        scan=f"{job.how.NAME} {job.window}",
    )
    plan = planned(asked, settings, note("planning"))
    work_on(plan, share, Scanner(scorer, plan.settings, exact(plan, load), note("computing")), progress, on_progress)
    built = Built(plan, share, progress, progress.seconds, progress.status)
    if share.count == 1:
        built.status = finished(plan, progress, on_progress)
    return built


class Scanner:
    """A unit's scans, computed again in float32 where they are not finite; what has none keeps the reason."""

    def __init__(self, model, settings, exact: Callable, on_batch: Callable = lambda tokens: None):
        self.model, self.settings, self.exact, self.on_batch = model, settings, exact, on_batch
        self.strategy, self.window = settings.scan.split()

    def __call__(self, unit: Unit) -> Results:
        dtype, width = np.dtype(self.settings.store), self.settings.width
        pooled = np.full((len(unit.lengths), width), np.nan, dtype)
        residues = np.full((int(unit.lengths.sum()), width), np.nan, dtype)
        results, ends = Results(unit, []), np.cumsum(unit.lengths)
        for i, (status, scan) in enumerate(self._scans(unit.sequences)):
            if scan is not None:
                with np.errstate(over="ignore"):
                    stored = scan.astype(dtype)
                if np.isfinite(stored).all():
                    residues[ends[i] - unit.lengths[i] : ends[i]], pooled[i] = stored, scan.mean(axis=0)
                else:
                    status = OVERFLOW
            results.status.append(status)
        results.pooled, results.residues = {LAYER: pooled}, {LAYER: residues}
        return results

    def _scans(self, sequences: list[str]):
        """(status, scan or None) of each."""
        scored = [_is_protein(sequence) for sequence in sequences]
        found = self._computed(self.model, [s for s, there in zip(sequences, scored, strict=True) if there])
        for sequence, there in zip(sequences, scored, strict=True):
            if not there:
                yield UNSCORED, None
                continue
            status, scan = layout.OK, next(found)
            if not np.isfinite(scan).all() and (model := self.exact()) is not None:
                status, (scan,) = layout.RECOMPUTED, self._computed(model, [sequence])
            yield (status, scan) if np.isfinite(scan).all() else (NONFINITE, None)

    def _computed(self, model, sequences: list[str]):
        return scans(model, sequences, self.strategy, self.window, self.settings.batch_tokens, self.on_batch)


def _is_protein(sequence: str) -> bool:
    try:
        return require_protein(sequence) == sequence
    except ValueError:
        return False


class Atlas(Dataset):
    """The scores of a data set of scans, by protein and variant; nothing is read before it is asked for."""

    SCORES = True

    def table(self, key: int | str) -> np.ndarray:
        """(residues, 20): all substitutions of a protein, columns ACDEFGHIKLMNPQRSTVWY."""
        return self.residues(key, LAYER)

    def lookup(self, key: str, variant: str, offset: int = 0) -> float:
        """The score of a substitution, or the sum of several. Raises KeyError, VariantError, DatasetError."""
        bound = bind(parse(variant), self.sequence(key), offset, variant)
        if bound.substitutions is None:
            raise VariantError("not for this strategy", f"{shown(variant)}: a table has substitutions only")
        rows = self.table(key)
        return float(sum(float(rows[at, STANDARD.index(new)]) for at, new in bound.substitutions.items()))


def lookup(folder: str | Path, query: str) -> float:
    """The score that a data set has for 'P04637 R175H', or 'P04637:p.Arg175His'."""
    return Atlas(folder).lookup(*split_query(query))


def split_query(query: str) -> tuple[str, str]:
    """The protein and the variant of a query."""
    found = re.fullmatch(r"\s*(\S+?)(?:\s+|:(?=p\.))(\S.*)", query)
    if found is None:
        raise ValueError(f"{shown(query)}: give a protein and a variant, such as 'P04637 R175H'")
    return found[1], found[2]
