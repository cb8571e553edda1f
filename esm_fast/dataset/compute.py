"""A unit's numbers: computed in the model's type, again in float32 where they are not finite, in halves of a batch
where memory runs out. A sequence that has none in the end keeps the reason as its status."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..inference.outputs import make
from ..inference.stream import run
from ..sequences.fasta import records_from
from ..sequences.tokenize import Policy, Report, Tokens, tokenize
from . import layout
from .settings import Settings
from .units import Results, Unit

NONFINITE, OVERFLOW, MEMORY = "not finite", "too large for float16", "out of memory"


class Computer:
    """exact: gives the same model in float32, or None where there is none beyond `model`."""

    def __init__(
        self, model, settings: Settings, exact: Callable, on_batch: Callable[[float], None] = lambda residues: None
    ):
        self.model, self.settings, self.exact, self.on_batch = model, settings, exact, on_batch
        self.budget = settings.batch_tokens
        pooled = [make(settings.pool, layer) for layer in settings.layers]
        residues = [make("per_residue", layer) for layer in settings.layers if settings.residues]
        self.outputs, self.pooled_count = pooled + residues, len(pooled)

    def __call__(self, unit: Unit) -> Results:
        dtype, width, layers = np.dtype(self.settings.store), self.settings.width, self.settings.layers
        results = Results(unit, [])
        results.pooled = {layer: np.full((len(unit.lengths), width), np.nan, dtype) for layer in layers}
        if self.settings.residues:
            results.residues = {layer: np.full((unit.lengths.sum(), width), np.nan, dtype) for layer in layers}
        bounds = np.concatenate([[0], np.cumsum(unit.lengths)])
        for i, arrays in enumerate(self._arrays(self.model, unit.sequences)):
            status, arrays = self._checked(arrays, unit.sequences[i])
            results.status.append(status)
            for rows, array in zip(results.pooled.values(), arrays[: self.pooled_count], strict=bool(arrays)):
                rows[i] = array
            for rows, array in zip(results.residues.values(), arrays[self.pooled_count :], strict=bool(arrays)):
                rows[bounds[i] : bounds[i + 1]] = array
        return results

    def _checked(self, arrays: list[np.ndarray] | None, sequence: str) -> tuple[str, list[np.ndarray]]:
        """Status and arrays as they are stored; no arrays where there are no numbers."""
        if arrays is None:
            return MEMORY, []
        status = layout.OK
        if not _finite(arrays) and (model := self.exact()) is not None:
            status = layout.RECOMPUTED
            (arrays,) = self._arrays(model, [sequence])
            if arrays is None:
                return MEMORY, []
        if not _finite(arrays):
            return NONFINITE, []
        with np.errstate(over="ignore"):
            stored = [array.astype(self.settings.store, copy=False) for array in arrays]
        return (status, stored) if _finite(stored) else (OVERFLOW, [])

    def _arrays(self, model, sequences: list[str]) -> Iterator[list[np.ndarray] | None]:
        """Per sequence, an array an output. The sizes of batches do not show in the numbers."""
        done, window = 0, self.settings.max_residues if self.settings.overlength == "window" else None
        while done < len(sequences):
            tokens = _tokens(sequences[done:])
            try:
                for protein in run(model, [tokens], self.outputs, self.budget, self.on_batch, window):
                    done += 1
                    yield protein.arrays
            except (RuntimeError, MemoryError) as error:
                if not _is_memory(error):
                    raise
                if self.budget > min(tokens.lengths.max(), window or model.config.limit("error")):
                    self.budget //= 2
                elif len(tokens) > 1:  # batches are of one sequence, and one of those planned together is too large
                    yield from self._arrays(model, sequences[done : done + 1])
                    done += 1
                else:
                    yield None
                    done += 1


def _tokens(sequences: list[str]) -> Tokens:
    """Those of a plan have passed its policies already."""
    parts = [
        tokenize(records, Policy(overlength="window", gaps="keep"), Report()) for records in records_from(sequences)
    ]
    offsets = np.cumsum([0, *(length for part in parts for length in part.lengths)], dtype=np.int64)
    headers, ids = [h for part in parts for h in part.headers], np.concatenate([part.ids for part in parts])
    return Tokens(headers, np.arange(len(headers)), ids, offsets)


def _finite(arrays: list[np.ndarray]) -> bool:
    return all(np.isfinite(array).all() for array in arrays)


def _is_memory(error: Exception) -> bool:
    """torch has a class for a full GPU, and only words for a full machine."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
