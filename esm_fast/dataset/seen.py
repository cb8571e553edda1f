"""What has been met before, among more texts than a Python dictionary has room for."""

import hashlib
from collections.abc import Iterable

import numpy as np

KEY = np.dtype([("high", "<u8"), ("low", "<u8")])  # 16 bytes of a SHA-256
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])


def keys_of(digests: Iterable[bytes]) -> np.ndarray:
    """The first 16 bytes of each digest."""
    return np.frombuffer(b"".join(digest[:16] for digest in digests), dtype=KEY)


def keys_of_texts(texts: Iterable[str]) -> np.ndarray:
    return keys_of(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in texts)


class Seen:
    """A number for each key, in 24 bytes: sorted runs, each at least twice as long as the next, searched one by one."""

    def __init__(self):
        self._runs: list[np.ndarray] = []

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The number of each key, or -1.

        Of two keys that share their first half, one may be called new although it is not: which is as good as
        impossible, and costs a protein computed twice.
        """
        found = np.full(len(keys), -1, dtype=np.int64)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run["high"], keys["high"]), len(run) - 1)
            hit = (run["high"][at] == keys["high"]) & (run["low"][at] == keys["low"])
            found[hit] = run["number"][at[hit]]
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


def _sorted(run: np.ndarray) -> np.ndarray:
    return run[np.argsort(run["high"], kind="stable")]  # stable: a merge where the parts are in order


class Ids:
    """Gives each record an id of its own: the second P12345 is P12345_2, or what comes after it if that is taken."""

    def __init__(self):
        self._seen = Seen()
        self._given: dict[str, int] = {}  # of ids seen twice, the last number put behind one

    def give(self, wanted: list[str], *, rename: bool) -> list[str | None]:
        """The ids of the next records; without `rename`, None for those whose id was there before."""
        before = self._seen.find(keys_of_texts(wanted)) >= 0
        fresh: dict[str, None] = {}
        given: list[str | None] = []
        for text, is_old in zip(wanted, before, strict=True):
            name: str | None = text
            if is_old or text in fresh:
                name = self._next(text, fresh) if rename else None
            if name is not None:
                fresh[name] = None
            given.append(name)
        self._seen.add(keys_of_texts(fresh), np.zeros(len(fresh), dtype=np.int64))
        return given

    def _next(self, text: str, fresh: dict[str, None]) -> str:
        while True:
            self._given[text] = self._given.get(text, 1) + 1
            name = f"{text}_{self._given[text]}"
            if name not in fresh and self._seen.find(keys_of_texts([name]))[0] < 0:
                return name
