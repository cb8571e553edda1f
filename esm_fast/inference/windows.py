"""What the model sees at once: a whole protein, or one of the windows that a long one is cut into."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..sequences.tokenize import Tokens


class Segment(NamedTuple):
    """What the model sees at once: a whole protein, or one window of a long one."""

    label: str
    ids: np.ndarray  # the residues of the Tokens it belongs to
    start: int  # in ids
    length: int
    windows: np.ndarray  # where the protein's windows begin, relative to its first residue
    number: int  # which of these this is
    residues: int  # length of the whole protein

    @property
    def last(self) -> bool:
        return self.number == len(self.windows) - 1


def segments(tokens: Iterable[Tokens], longest: int) -> Iterator[Segment]:
    for chunk in tokens:
        for label, start, end in zip(chunk.headers, chunk.offsets[:-1], chunk.offsets[1:], strict=True):
            residues = int(end - start)
            windows = windows_of(residues, longest)
            for number, at in enumerate(windows):
                length = min(longest, residues)
                yield Segment(label, chunk.ids, int(start + at), length, windows, number, residues)


def windows_of(residues: int, longest: int) -> np.ndarray:
    """Where windows of `longest` residues begin: every half window, and the last one flush with the end."""
    if residues <= longest:
        return np.zeros(1, dtype=np.int64)
    return np.append(np.arange(0, residues - longest, longest // 2 or 1), residues - longest)


def share_of(segment: Segment) -> np.ndarray:
    """1 / (number of windows covering it), for every residue of the segment."""
    at = segment.windows[segment.number] + np.arange(segment.length)
    begun = np.searchsorted(segment.windows, at, side="right")
    ended = np.searchsorted(segment.windows, at - segment.length, side="right")
    return 1.0 / (begun - ended)
