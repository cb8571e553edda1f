"""Which examples are for training, which are held out: random, by cluster, in folds; and what leaks between them."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from . import pairs
from .examples import SPLITS, Example, ExamplesError

_FOLDS = 10  # without a column of splits, one of ten is for validation and one for testing
_FEW = 3  # groups of a class below which it is for training only


def with_splits(examples: Sequence[Example], *, seed: int = 0, stratify: bool, clusters=None) -> list[Example]:
    """The examples, each in a split.

    Splits that are given stay; where none is "valid", a tenth of "train" becomes it. Without any, a tenth is for
    validation and a tenth for testing. Equal sequences, or those of a cluster, are never divided. Of pairs, see
    `pairs.Held`: the proteins are, so that each held-out pair has one that training has not.

    stratify: each class is divided alike, of single proteins. clusters: name of an example -> its cluster.
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
    names = {0: "valid"} if given else {0: "valid", 1: "test"}
    if inner and inner[0].partner:
        names = names if given else {0: "test", 1: "valid"}  # the valid pairs have no protein that a test holds out
        numbers = pairs.Held(inner, _FOLDS, len(names), seed, _groups(clusters)).numbers
    else:
        numbers = folds(inner, _FOLDS, seed=seed, stratify=stratify, clusters=clusters)
    drawn = iter(names.get(number, "train") for number in numbers)
    return [replace(e, split=next(drawn)) if e.split in ("", "train") else e for e in examples]


def folds(examples: Sequence[Example], count: int, *, seed: int, stratify: bool, clusters=None) -> list[int]:
    """The fold of each example, 0 to count - 1; equal groups (sequences or clusters) share one.

    The groups are put in the order of a hash, class by class where they are stratified, and dealt out. Those of a
    class with very few are all dealt to the fold 2.
    """
    groups: dict[str, list[Example]] = defaultdict(list)
    groups_of = _groups(clusters)
    for example in examples:
        groups[groups_of(example)[0]].append(example)
    if len(groups) < _FEW:
        raise ExamplesError(f"{len(groups)} different proteins are too few to hold some out; give {_FEW} or more")
    count = min(count, len(groups))
    stratum = {name: _stratum(members) if stratify else "" for name, members in groups.items()}
    size = Counter(stratum.values())
    fold, dealt = {}, 0
    for name in sorted(groups, key=lambda name: (stratum[name], pairs.hashed(seed, name))):
        if size[stratum[name]] < _FEW:
            fold[name] = 2
        else:
            fold[name], dealt = dealt % count, dealt + 1
    return [fold[groups_of(example)[0]] for example in examples]


def turns(examples: Sequence[Example], count: int, **how) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """(train, valid, test), numbers of examples, of each turn of a cross validation: one fold tests, the next chooses.

    how: as for `folds`. Of pairs, those in which a protein is that another part of the turn holds out are left out.
    """
    if examples[0].partner:
        held = pairs.Held(examples, count, count, how["seed"], _groups(how["clusters"]))
        numbers, touched = held.numbers, held.touched
    else:
        numbers = np.array(folds(examples, count, **how))
        touched = numbers == np.arange(count)[:, None]
    for fold in range(count):
        after = (fold + 1) % count
        test, valid = numbers == fold, (numbers == after) & ~touched[fold]
        found = tuple(np.flatnonzero(mask).tolist() for mask in (~touched[fold] & ~touched[after], valid, test))
        if not all(found):
            raise ExamplesError(f"fold {fold + 1} of {count} has no example; give fewer folds")
        yield found


def _groups(clusters: Mapping[str, str] | None) -> Callable[[Example], list[str]]:
    """Of each of an example's proteins."""

    def found(example: Example) -> list[str]:
        if clusters is None:
            return list(example.proteins)
        for name in example.names:
            if name not in clusters:
                raise ExamplesError(f"{example.place}: the protein {name!r} is in no cluster of the table")
        return [clusters[name] for name in example.names]

    return found


def _stratum(members: list[Example]) -> str:
    return next(iter(members[0].labels.values()))


def warnings_of(examples: Sequence[Example], *, kind: str = "") -> list[str]:
    """What would make the metrics look better than they are, or the labels contradict each other; with counts.

    kind: of pairs, see `pairs`.
    """
    by_sequence = defaultdict(list)
    for example in examples:
        by_sequence[tuple(sorted(example.proteins)) if kind == "symmetric" else example.proteins].append(example)
    several = [members for members in by_sequence.values() if len(members) > 1]
    found = pairs.warnings_of(examples) if kind else []
    for split in () if kind else SPLITS[1:]:
        leaked = [m for m in several if {split, "train"} <= {example.split for example in m}]
        if leaked:
            count = sum(example.split == split for members in leaked for example in members)
            found.append(f"proteins of {split} that are in train too: {count:,}, such as {leaked[0][0].place}")
    differing = [m for m in several if len({tuple(example.labels.items()) for example in m}) > 1]
    if differing:
        places = " and ".join(example.place for example in differing[0][:2])
        what = "pairs" if kind else "sequences"
        found.append(f"{what} with labels that contradict each other: {len(differing):,}, such as {places}")
    return found
