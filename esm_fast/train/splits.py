"""Which examples are for training, which are held out: random, by cluster, in folds; and what leaks between them."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from .examples import SPLITS, Example, ExamplesError

_FOLDS = 10  # without a column of splits, one of ten is for validation and one for testing
_FEW = 3  # groups of a class below which it is for training only


def with_splits(examples: Sequence[Example], *, seed: int = 0, stratify: bool, clusters=None) -> list[Example]:
    """The examples, each in a split.

    Splits that are given stay; where none is "valid", a tenth of "train" becomes it. Without any, a tenth is for
    validation and a tenth for testing. Equal sequences, or those of a cluster, are never divided.

    stratify: each class is divided alike. clusters: name of an example -> its cluster.
    """
    given = [example for example in examples if example.split]
    if given and len(given) < len(examples):
        bad = next(example for example in examples if not example.split)
        raise ExamplesError(f"{bad.place}: split is empty, and others have one")
    if {example.split for example in given} >= {"train", "valid"}:
        return list(examples)
    if given and not any(example.split == "train" for example in given):
        raise ExamplesError("no example is for 'train'; give more, or leave the column of splits out")
    inner = [example for example in examples if example.split in ("", "train")]
    numbers = folds(inner, _FOLDS, seed=seed, stratify=stratify, clusters=clusters)
    names = {0: "valid"} if given else {0: "valid", 1: "test"}
    drawn = iter(names.get(number, "train") for number in numbers)
    return [replace(e, split=next(drawn)) if e.split in ("", "train") else e for e in examples]


def folds(examples: Sequence[Example], count: int, *, seed: int, stratify: bool, clusters=None) -> list[int]:
    """The fold of each example, 0 to count - 1; equal groups (sequences or clusters) share one.

    The groups are put in the order of a hash, class by class where they are stratified, and dealt out. Those of a
    class with very few are all dealt to the fold 2.
    """
    groups: dict[str, list[Example]] = defaultdict(list)
    group_of = _group(clusters)
    for example in examples:
        groups[group_of(example)].append(example)
    if len(groups) < _FEW:
        raise ExamplesError(f"{len(groups)} different proteins are too few to hold some out; give {_FEW} or more")
    count = min(count, len(groups))
    stratum = {name: _stratum(members) if stratify else "" for name, members in groups.items()}
    size = Counter(stratum.values())
    fold, dealt = {}, 0
    for name in sorted(groups, key=lambda name: (stratum[name], _hash(seed, name))):
        if size[stratum[name]] < _FEW:
            fold[name] = 2
        else:
            fold[name], dealt = dealt % count, dealt + 1
    return [fold[group_of(example)] for example in examples]


def _group(clusters: Mapping[str, str] | None) -> Callable[[Example], str]:
    if clusters is None:
        return lambda example: example.sequence

    def cluster(example: Example) -> str:
        if example.name not in clusters:
            raise ExamplesError(f"{example.place}: the protein {example.name!r} is in no cluster of the table")
        return clusters[example.name]

    return cluster


def _stratum(members: list[Example]) -> str:
    return next(iter(members[0].labels.values()))


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def warnings_of(examples: Sequence[Example]) -> list[str]:
    """What would make the metrics look better than they are, or the labels contradict each other; with counts."""
    by_sequence = defaultdict(list)
    for example in examples:
        by_sequence[example.sequence].append(example)
    several = [members for members in by_sequence.values() if len(members) > 1]
    found = []
    for split in SPLITS[1:]:
        leaked = [m for m in several if {split, "train"} <= {example.split for example in m}]
        if leaked:
            count = sum(example.split == split for members in leaked for example in members)
            found.append(f"proteins of {split} that are in train too: {count:,}, such as {leaked[0][0].place}")
    differing = [m for m in several if len({tuple(example.labels.items()) for example in m}) > 1]
    if differing:
        places = " and ".join(example.place for example in differing[0][:2])
        found.append(f"sequences with labels that contradict each other: {len(differing):,}, such as {places}")
    return found
