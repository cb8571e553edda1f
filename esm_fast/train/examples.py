"""Labelled proteins for fine-tuning: a table of sequences and labels, and the labels as numbers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..alphabet import encode_definition
from ..sequences.table import TableError, read_table

TASKS, LEVELS, SPLITS = ("regression", "classification"), ("sequence", "residue"), ("train", "valid", "test")
UNLABELLED = "?"  # a residue without a class; a number that is missing is nan
_NO_CLASS = -100  # what torch's cross-entropy ignores
_VALID_SHARE = 0.1
_MISSING = ("nan", "na", "n/a", "null", "none")  # how programs write that there is no label


class ExamplesError(ValueError):
    """A table that cannot be used; the message says where."""


@dataclass(frozen=True)
class Example:
    """label: a number or a class; at the residue level a letter a residue, or numbers between spaces."""

    name: str
    sequence: str
    label: str
    split: str


def read_examples(path: str | Path) -> list[Example]:
    """Reads a table (`sequences.table`) with the columns sequence and label, and perhaps id and split.

    A final * of a sequence is stripped, as `esm-fast embed` does. Without a split, a tenth is held out by a hash of
    each sequence. Raises ExamplesError naming file, line and column.
    """
    path = Path(path)
    try:
        table = read_table(path)
        for column in ("sequence", "label"):
            if column not in table.columns:
                raise ExamplesError(f"{path}: line 1: there is no column {column!r} among {table.columns}")
        examples = [_example(path, row.line, row.values) for row in table.rows]
    except TableError as error:
        raise ExamplesError(str(error)) from None
    if not examples:
        raise ExamplesError(f"{path} has no rows")
    return examples


def _example(path: Path, line: int, row: dict) -> Example:
    where = f"{path}: line {line}"
    sequence, label = row["sequence"].strip().upper().removesuffix("*"), row["label"].strip()
    for column, value in (("sequence", sequence), ("label", label)):
        if not value:
            raise ExamplesError(f"{where}: {column} is empty")
    split = row.get("split") or _split_of(sequence)
    if split not in SPLITS:
        raise ExamplesError(f"{where}: split is {split!r}; choose from {', '.join(SPLITS)}")
    return Example(row.get("id") or f"line {line}", sequence, label, split)


def _split_of(sequence: str) -> str:
    """Of equal sequences always the same: none is in two splits."""
    chance = int.from_bytes(hashlib.sha256(sequence.encode()).digest()[:8], "little") / 2**64
    return "valid" if chance < _VALID_SHARE else "train"


def encode(examples: Sequence[Example], max_residues: int | None) -> list[np.ndarray]:
    """Each sequence as token ids, uint8, without <cls> and <eos>. Raises ExamplesError."""
    encoded = []
    for example in examples:
        try:
            ids = encode_definition(example.sequence)
        except ValueError as error:
            raise ExamplesError(f"{example.name}: {error}") from None
        if max_residues is not None and len(ids) > max_residues:
            raise ExamplesError(f"{example.name} has {len(ids)} residues, the model takes {max_residues}; cut it")
        encoded.append(np.array(ids, dtype=np.uint8))
    return encoded


@dataclass(frozen=True)
class Targets:
    """How labels become numbers. classes: their names, empty for regression, whose mean and spread are standardised."""

    task: str
    level: str
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    spread: float = 1.0

    @classmethod
    def fit(cls, task: str, level: str, examples: Sequence[Example]) -> "Targets":
        """From the examples of training. Raises ExamplesError."""
        values = [value for example in examples for value in _values(task, level, example)]
        if task == "classification":
            classes = tuple(sorted({value for value in values if value != UNLABELLED or level == "sequence"}))
            if len(classes) < 2:
                raise ExamplesError(f"the training examples have {len(classes)} classes; there must be two or more")
            return cls(task, level, classes)
        known = np.array([value for value in values if not np.isnan(value)])
        if known.size < 2 or known.std() == 0:
            raise ExamplesError("the labels of the training examples are all the same, or missing")
        return cls(task, level, (), float(known.mean()), float(known.std()))

    @property
    def outputs(self) -> int:
        return len(self.classes) or 1

    def encode(self, example: Example, residues: int) -> torch.Tensor:
        """(1,) or (residues,): numbers of classes, or standardised numbers."""
        values = _values(self.task, self.level, example)
        expected = residues if self.level == "residue" else 1
        if len(values) != expected:
            raise ExamplesError(f"{example.name} has {residues} residues and {len(values)} labels")
        if self.task == "regression":
            return (torch.tensor(values, dtype=torch.float32) - self.mean) / self.spread
        numbers = {name: number for number, name in enumerate(self.classes)}
        if self.level == "residue":
            numbers[UNLABELLED] = _NO_CLASS
        if unknown := sorted(set(values) - set(numbers)):
            raise ExamplesError(f"{example.name}: no training example has the class {unknown[0]!r}")
        return torch.tensor([numbers[value] for value in values])

    def loss(self, predicted: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(sum over what has a label, how many that is)."""
        known = self.known(wanted)
        predicted, wanted = predicted[known].float(), wanted[known]
        if self.task == "classification":
            return torch.nn.functional.cross_entropy(predicted, wanted, reduction="sum"), len(wanted)
        return (predicted[:, 0] - wanted).square().sum(), len(wanted)

    def known(self, wanted: torch.Tensor) -> torch.Tensor:
        return wanted != _NO_CLASS if self.task == "classification" else ~wanted.isnan()

    def metrics(self, predicted: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
        """accuracy, or r2 and Spearman's rank correlation; nan where they are not defined."""
        known = self.known(wanted)
        predicted, wanted = predicted[known].double(), wanted[known]
        if self.task == "classification":
            return {"accuracy": float((predicted.argmax(1) == wanted).double().mean())}
        x, y = predicted[:, 0], wanted.double()
        spread = float((y - y.mean()).square().sum())
        r2 = 1 - float((x - y).square().sum()) / spread if spread else float("nan")
        return {"r2": r2, "spearman": float(torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1])}


def _ranks(x: torch.Tensor) -> torch.Tensor:
    """Equal values share the mean of their ranks."""
    _, group, count = x.unique(sorted=True, return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[group].double()


def _values(task: str, level: str, example: Example) -> list:
    """An example's labels: names of classes, or numbers."""
    if task == "classification" and level == "sequence":
        if example.label.lower() in _MISSING:
            raise ExamplesError(f"{example.name}: label is {example.label!r}, which is no class; leave the row out")
        return [example.label]
    if task == "classification":
        return list(example.label)
    words = [example.label] if level == "sequence" else example.label.split()
    try:
        values = [float(word) for word in words]
    except ValueError as error:
        raise ExamplesError(f"{example.name}: label: {error}") from None
    if bad := [value for value in values if np.isinf(value) or (np.isnan(value) and level == "sequence")]:
        raise ExamplesError(f"{example.name}: label {bad[0]} is no number to learn")
    return values
