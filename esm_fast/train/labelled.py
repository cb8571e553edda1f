"""The examples of a fine-tuning as arrays: their tokens, what the head should say, and what a frozen model says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..inference.embed import token_budget
from ..inference.outputs import make
from ..inference.stream import run
from ..models.encoder import Encoder
from ..sequences.tokenize import Policy, Report, Tokens
from . import pairs, sets
from .examples import SPLITS, Example, ExamplesError, labelled
from .parts import Part
from .splits import warnings_of, with_splits
from .targets import Targets


@dataclass
class Labelled:
    """examples: those that are used; wanted: of each float32 (rows, columns), see `Targets`.

    tokens: of the proteins; proteins: int64 (examples, 1), the number of each one's, or of pairs (examples, 2).
    """

    examples: list[Example]
    tokens: Tokens
    proteins: np.ndarray
    targets: Targets
    wanted: list[np.ndarray]
    policy: Policy
    report: Report
    warnings: list[str]
    left_out: int  # without a label
    unknown: int  # examples left out for an unknown residue
    kind: str  # of pairs, see `pairs`

    @cached_property
    def rows(self) -> np.ndarray:
        """int64 (examples + 1,): where each one's rows begin in the features of all."""
        return np.cumsum([0, *map(len, self.wanted)])

    def rows_of(self, of_residues: bool) -> np.ndarray:
        """The same in the features of residues, whatever has the labels, or of what has them."""
        return self.tokens.offsets if of_residues else self.rows

    def wanted_of(self, numbers: Sequence[int]) -> np.ndarray:
        """float32 (their rows, columns)."""
        return np.concatenate([self.wanted[number] for number in numbers])

    def of(self, split: str) -> list[int]:
        return [number for number, example in enumerate(self.examples) if example.split == split]

    @property
    def lengths(self) -> np.ndarray:
        """int64 (examples,): residues, of a pair those of both."""
        return self.tokens.lengths[self.proteins].sum(1)

    def ids(self, number: int) -> np.ndarray:
        """Of the residues of an example, of a pair those of the first protein."""
        at = self.proteins[number, 0]
        return self.tokens.ids[self.tokens.offsets[at] : self.tokens.offsets[at + 1]]

    def only(self, numbers: Sequence[int]) -> tuple[Tokens, np.ndarray]:
        """(the proteins of some examples, their numbers among these for each example)."""
        own = self.proteins[list(numbers)]
        kept = np.zeros(len(self.tokens), dtype=bool)
        kept[own] = True
        return self.tokens.where(kept), (np.cumsum(kept) - 1)[own]

    def combined(self, features: np.ndarray) -> np.ndarray:
        """What a head takes, of the features of all proteins."""
        return pairs.combined_rows(self.kind, features, self.proteins)

    def part(self, features: np.ndarray, numbers: Sequence[int]) -> Part:
        """The rows of some examples, and what they should be."""
        bounds = self.rows
        at = np.concatenate([np.arange(bounds[n], bounds[n + 1]) for n in numbers])
        return Part(features[at], self.wanted_of(numbers))


def labelled_of(esm: Encoder, examples: Sequence[Example], settings, clusters=None) -> Labelled:
    """Raises ExamplesError for examples that cannot be used, naming the place."""
    limit = esm.config.limit(settings.overlength)
    policy = Policy(settings.unknown, "error", settings.overlength, limit)
    report, given = Report(), labelled(examples, settings.missing)
    if given and bool(given[0].partner) != bool(settings.pairs):
        raise ExamplesError(f"pairs is {settings.pairs!r}, and a row has {len(given[0].proteins)} proteins")
    kept, tokens, proteins = pairs.proteins_of(given, policy, report) if given else ([], None, None)
    unknown = len(given) - len(kept)
    if not kept:
        raise ExamplesError("no example is left")
    stratify = settings.task == "classification" and settings.level == "sequence"
    kept = with_splits(kept, seed=settings.seed, stratify=stratify, clusters=clusters)
    parts = {split: [e for e in kept if e.split == split] for split in SPLITS}
    for split in ("train", "valid"):
        if not parts[split]:
            raise ExamplesError(f"no example is for {split!r}; give more, or a column of splits")
    warnings = warnings_of(kept, kind=settings.pairs)
    if settings.multi_label:
        kept, more = sets.expanded(kept, settings.multi_label)
        warnings += more
        targets = Targets.fit(settings.task, settings.level, [e for e in kept if e.split == "train"])
        targets = replace(targets, separator=settings.multi_label, name=next(iter(parts["train"][0].labels)))
    else:
        warnings += sets.suspected(kept) if stratify else []
        targets = Targets.fit(settings.task, settings.level, parts["train"])
    cut = policy.overlength == "truncate"
    lengths = tokens.lengths[proteins[:, 0]].tolist()
    wanted = [targets.encode(e, n, truncated=cut and n == limit) for e, n in zip(kept, lengths, strict=True)]
    left_out = len(examples) - len(given)
    return Labelled(
        kept, tokens, proteins, targets, wanted, policy, report, warnings, left_out, unknown, settings.pairs
    )


def features_of(
    esm: Encoder,
    data: Labelled,
    layers: Sequence[int],
    batch_tokens: int | None,
    on_batch: Callable = lambda n: None,
    *,
    of_residues: bool | None = None,
) -> dict[int, np.ndarray]:
    """float32 (all rows, width) of each layer: a row a protein of `tokens`, its mean, or a row a residue; by the one
    stream.

    of_residues: which; None for what has the labels. All are in memory: 4 bytes x rows x width a layer.
    """
    of_residues = data.targets.level == "residue" if of_residues is None else of_residues
    pool = "per_residue" if of_residues else "mean"
    count, width = int(data.tokens.offsets[-1]) if of_residues else len(data.tokens), esm.config.embed_dim
    found = {layer: np.empty((count, width), np.float32) for layer in layers}
    outputs, at = [make(pool, layer) for layer in layers], 0
    for protein in run(esm, [data.tokens], outputs, token_budget(esm, batch_tokens), on_batch, data.policy.window):
        rows = len(protein.arrays[0]) if pool == "per_residue" else 1
        for layer, array in zip(layers, protein.arrays, strict=True):
            found[layer][at : at + rows] = array
        at += rows
    return found
