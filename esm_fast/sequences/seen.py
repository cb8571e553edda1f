"""What has been met before, among more texts than a Python dictionary has room for."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

KEY = np.dtype([("high", "<u8"), ("low", "<u8")])  # 16 bytes of a SHA-256
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])
_STARTS = np.arange(256, dtype=np.uint64) << np.uint64(56)  # of the parts that `high` falls into
# The latest keys join the others when they are more than so many, and than this share of them: seldom enough to cost
# little, often enough to take little room beside them.
_FEW, _SHARE = 1 << 18, 16


def keys_of(digests: Iterable[bytes]) -> np.ndarray:
    """The first 16 bytes of each digest."""
    return np.frombuffer(b"".join(digest[:16] for digest in digests), dtype=KEY)


def keys_of_texts(texts: Iterable[str]) -> np.ndarray:
    return keys_of(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in texts)


class Seen:
    """A number for each key, in 24 bytes and little more.

    The latest are in sorted runs, each at least twice as long as the next. When there are many, they join the others,
    which lie sorted in parts, one part after the other: merging has to hold only one of them twice.
    """

    def __init__(self):
        self._runs: list[np.ndarray] = []
        self._parts = [np.empty(0, dtype=_ENTRY)] * len(_STARTS)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The number of each key, or -1.

        Of two keys that share their first half, one may be called new although it is not: which is as good as
        impossible, and costs a protein computed twice.
        """
        order = np.argsort(keys["high"], kind="stable")
        wanted = keys[order]
        best = np.full(len(keys), -1, dtype=np.int64)
        for run in self._runs:
            np.maximum(best, _numbers(run, wanted), out=best)
        for part, places in _cut(wanted):
            if len(self._parts[part]):
                np.maximum(best[places], _numbers(self._parts[part], wanted[places]), out=best[places])
        found = np.empty_like(best)
        found[order] = best
        return found

    def add(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Keys that are not in it yet, each once."""
        if not len(keys):
            return
        run = np.empty(len(keys), dtype=_ENTRY)
        run["high"], run["low"], run["number"] = keys["high"], keys["low"], numbers
        self._runs.append(_sorted(run))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            self._runs[-2:] = [_sorted(np.concatenate(self._runs[-2:]))]
        if sum(map(len, self._runs)) > max(_FEW, sum(map(len, self._parts)) // _SHARE):
            self._settle()

    def _settle(self) -> None:
        latest = _sorted(np.concatenate(self._runs))
        self._runs = []
        for part, places in _cut(latest):
            self._parts[part] = _sorted(np.concatenate([self._parts[part], latest[places]]))


def _sorted(run: np.ndarray) -> np.ndarray:
    return run[np.argsort(run["high"], kind="stable")]  # stable: a merge where the parts are in order


def _numbers(run: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The number of each key in a sorted run that is not empty, or -1."""
    entries = run[np.minimum(np.searchsorted(run["high"], keys["high"]), len(run) - 1)]
    hit = (entries["high"] == keys["high"]) & (entries["low"] == keys["low"])
    return np.where(hit, entries["number"], -1)


def _cut(entries: np.ndarray) -> Iterator[tuple[int, slice]]:
    """The parts that sorted entries belong to, and where those of each lie."""
    bounds = np.append(np.searchsorted(entries["high"], _STARTS), len(entries))
    for part in np.flatnonzero(np.diff(bounds)).tolist():
        yield part, slice(bounds[part], bounds[part + 1])
