"""Labels as numbers that a head learns, and a head's outputs as labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .examples import MISSING, Example, ExamplesError

TASKS, LEVELS = ("regression", "classification"), ("sequence", "residue")
UNLABELLED = "?"  # a residue without a class; a number that is missing is nan
_MANY = 1000  # classes: more are numbers that somebody takes for classes, or free text


@dataclass(frozen=True)
class Target:
    """A column of labels. classes: their names, empty for regression, whose mean and spread are standardised."""

    name: str
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    spread: float = 1.0

    @property
    def outputs(self) -> int:
        return len(self.classes) or 1


@dataclass(frozen=True)
class Targets:
    """How labels become numbers: (rows, columns), the number of a class or a standardised number, nan for none.

    separator: of multi-label classification what is between the classes of a protein; each class is a column then, no
    or yes, and `name` is that of the labels' own column (see `sets`).
    """

    task: str
    level: str
    columns: tuple[Target, ...] = (Target("label"),)
    separator: str = ""
    name: str = ""

    @classmethod
    def fit(cls, task: str, level: str, examples: Sequence[Example]) -> "Targets":
        """From the examples of training. Raises ExamplesError."""
        return cls(task, level, tuple(_fit(task, level, name, examples) for name in examples[0].labels))

    @classmethod
    def from_json(cls, about: dict) -> "Targets":
        """What `dataclasses.asdict` made; also of one column, as it was written before there were several."""
        if "columns" not in about:
            about = {"task": about.pop("task"), "level": about.pop("level"), "columns": [{"name": "label", **about}]}
        columns = tuple(Target(**column | {"classes": tuple(column["classes"])}) for column in about["columns"])
        return cls(about["task"], about["level"], columns, about.get("separator", ""), about.get("name", ""))

    @property
    def outputs(self) -> int:
        return sum(column.outputs for column in self.columns)

    def parts(self, outputs):
        """Each column's part of (rows, outputs), a tensor or an array."""
        start = 0
        for column in self.columns:
            yield column, outputs[:, start : start + column.outputs]
            start += column.outputs

    def encode(self, example: Example, residues: int, *, truncated: bool = False) -> np.ndarray:
        """float32 (1, columns) or (residues, columns). truncated: the protein was cut to its first `residues`."""
        made = [self._encode(column, example, residues, truncated) for column in self.columns]
        return np.stack(made, axis=1).astype(np.float32)

    def _encode(self, column: Target, example: Example, residues: int, truncated: bool) -> np.ndarray:
        text, rows = example.labels[column.name], residues if self.level == "residue" else 1
        if not text:
            return np.full(rows, np.nan)
        values = _values(self.task, self.level, column.name, example)
        if truncated and self.level == "residue" and len(values) > rows:
            values = values[:rows]
        if len(values) != rows:
            raise ExamplesError(f"{example.place}: {residues} residues and {len(values)} labels in {column.name}")
        if self.task == "regression":
            return (np.array(values) - column.mean) / column.spread
        numbers = {name: float(number) for number, name in enumerate(column.classes)}
        if self.level == "residue":
            numbers[UNLABELLED] = np.nan
        if unknown := sorted(set(values) - set(numbers)):
            raise ExamplesError(f"{example.place}: no training example has the class {unknown[0]!r}")
        return np.array([numbers[value] for value in values])

    def loss(self, predicted: torch.Tensor, wanted: torch.Tensor, weights=None) -> tuple[torch.Tensor, int]:
        """(sum over what has a label, how many that is): cross-entropies in nats, or squares.

        weights: for each column a weight a class, or None.
        """
        total, count = predicted.sum() * 0.0, 0
        for number, (column, part) in enumerate(self.parts(predicted.float())):
            known = ~wanted[:, number].isnan()
            own, chosen = wanted[known, number], part[known]
            if column.classes:
                weight = None if weights is None else weights[number]
                total = total + torch.nn.functional.cross_entropy(chosen, own.long(), weight=weight, reduction="sum")
            else:
                total = total + (chosen[:, 0] - own).square().sum()
            count += len(own)
        return total, count

    def class_weights(self, wanted: np.ndarray, balanced: bool) -> list[torch.Tensor | None]:
        """For each column: rows / (classes x rows of the class), which all classes together weigh alike; or None."""
        found = []
        for number, column in enumerate(self.columns):
            known = wanted[~np.isnan(wanted[:, number]), number].astype(np.int64)
            counts = np.bincount(known, minlength=len(column.classes)) if column.classes else None
            found.append(
                torch.tensor(len(known) / (len(counts) * counts.clip(min=1)), dtype=torch.float32)
                if balanced and column.classes
                else None
            )
        return found

    def numbers(self, outputs: np.ndarray) -> list[np.ndarray]:
        """For each column its (rows,) numbers, or its (rows, classes) probabilities, of a head's outputs."""
        return [
            _softmax(part.astype(np.float64)) if column.classes else part[:, 0] * column.spread + column.mean
            for column, part in self.parts(outputs)
        ]

    def probabilities(self, outputs: np.ndarray) -> list[np.ndarray]:
        """For each column (rows, classes); of multi-label classification one such array, that each class is there."""
        values = self.numbers(outputs)
        return [np.stack([own[:, 1] for own in values], axis=1)] if self.separator else values

    def labels(self, outputs: np.ndarray) -> list[list]:
        """For each column and row the class or the number; of multi-label classification, a tuple of classes a row."""
        if self.separator:
            there = self.probabilities(outputs)[0] >= 0.5
            return [[tuple(c.name for c, yes in zip(self.columns, row, strict=True) if yes) for row in there]]
        return [
            [column.classes[best] for best in values.argmax(1).tolist()] if column.classes else values.tolist()
            for column, values in zip(self.columns, self.numbers(outputs), strict=True)
        ]


def _softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return x / x.sum(axis=1, keepdims=True)


def _fit(task: str, level: str, name: str, examples: Sequence[Example]) -> Target:
    values = [value for e in examples if e.labels[name] for value in _values(task, level, name, e)]
    if task == "classification":
        classes = tuple(sorted({value for value in values if value != UNLABELLED or level == "sequence"}))
        if len(classes) < 2:
            raise ExamplesError(f"{name}: the training examples have {len(classes)} classes; there must be two or more")
        if len(classes) > _MANY or (len(values) >= 20 and len(classes) == len(values)):
            raise ExamplesError(
                f"{name}: {len(values):,} training labels are {len(classes):,} classes, such as {classes[0]!r}; "
                "for numbers give --task regression"
            )
        return Target(name, classes)
    known = np.array([value for value in values if not np.isnan(value)])
    if known.size < 2 or known.std() == 0:
        raise ExamplesError(f"{name}: the labels of the training examples are all the same, or missing")
    return Target(name, (), float(known.mean()), float(known.std()))


def _number(word: str) -> float:
    if "_" in word:  # which float takes for nothing: 1_5 would be 15
        raise ValueError(f"could not convert string to float: {word!r}")
    return float(word)


def _values(task: str, level: str, name: str, example: Example) -> list:
    """An example's labels: names of classes, or numbers."""
    text = example.labels[name]
    if task == "classification" and level == "sequence":
        if text.lower() in MISSING:
            raise ExamplesError(f"{example.place}: {name} is {text!r}, which is no class; leave the row out")
        return [text]
    if task == "classification":
        return list(text)
    words = [text] if level == "sequence" else text.split()
    try:
        values = [_number(word) for word in words]
    except ValueError as error:
        raise ExamplesError(f"{example.place}: {name}: {error}") from None
    if bad := [value for value in values if np.isinf(value) or (np.isnan(value) and level == "sequence")]:
        raise ExamplesError(f"{example.place}: {name}: {bad[0]} is no number to learn")
    return values
