"""Multi-label classification: a protein has any number of classes, written together in its label, such as a;b."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from .examples import Example, ExamplesError

NO, YES = "no", "yes"
_SEPARATORS = ";|,"  # that a label of one class seldom has


def classes_of(text: str, separator: str) -> list[str]:
    """Those of a label; the separator alone is a protein without any."""
    return sorted({part.strip() for part in text.split(separator)} - {""})


def label_of(classes: Iterable[str], separator: str) -> str:
    """What `classes_of` reads."""
    return separator.join(classes) or separator


def expanded(examples: Sequence[Example], separator: str) -> tuple[list[Example], list[str]]:
    """(the examples with a label, no or yes, for each class; warnings of the classes that cannot be learned).

    Raises ExamplesError where there are several columns of labels, or no class that some training examples have and
    some have not.
    """
    if len(examples[0].labels) > 1:
        raise ExamplesError("several columns of labels cannot be multi-label too; give one of them")
    own = [classes_of(next(iter(example.labels.values())), separator) for example in examples]
    trained = [found for found, example in zip(own, examples, strict=True) if example.split == "train"]
    counts = Counter(name for found in trained for name in found)
    classes = sorted(name for name, count in counts.items() if count < len(trained))
    if not classes:
        raise ExamplesError("there is no class that some training examples have and others have not")
    left_out = sorted({name for found in own for name in found} - set(classes))
    warnings = []
    if left_out:
        warnings = [f"classes that no training example has, or all, left out: {len(left_out):,}, such as {left_out[0]}"]
    made = [
        replace(example, labels={name: YES if name in found else NO for name in classes})
        for example, found in zip(examples, map(set, own), strict=True)
    ]
    return made, warnings


def suspected(examples: Sequence[Example]) -> list[str]:
    """A warning of labels that look like several classes, and are taken as one."""
    values = {value for example in examples for value in example.labels.values() if value}
    for separator in _SEPARATORS:
        several = sorted(value for value in values if len(classes_of(value, separator)) > 1)
        parts = Counter(part for value in values for part in classes_of(value, separator))
        if several and all(any(parts[part] > 1 for part in classes_of(value, separator)) for value in several):
            return [f"labels such as {several[0]!r} are classes of their own; for several a protein: --multi-label"]
    return []
