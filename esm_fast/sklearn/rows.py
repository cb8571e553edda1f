"""Rows that were computed before, by key: in memory, and in a file that processes share."""

import hashlib
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np

_KEPT_BYTES = 256 * 2**20


class _Kept:
    """Rows in memory by key, the ones used last; shared by all embedders of a process."""

    def __init__(self, limit: int):
        self._limit, self._size, self._rows = limit, 0, OrderedDict()

    def find(self, keys: Iterable[bytes]) -> dict[bytes, np.ndarray]:
        return {key: self._rows[key] for key in keys if key in self._rows}

    def keep(self, rows: dict[bytes, np.ndarray]) -> None:
        for key, row in rows.items():
            if key not in self._rows:
                self._rows[key] = row
                self._size += row.nbytes
            self._rows.move_to_end(key)
        while self._size > self._limit:
            self._size -= self._rows.popitem(last=False)[1].nbytes


KEPT = _Kept(_KEPT_BYTES)


def _opened(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, timeout=60)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, row BLOB, sha256 BLOB) WITHOUT ROWID"
        )
    except sqlite3.Error as error:
        raise OSError(f"{path} cannot be used as a cache: {error}") from None
    return connection


def read(path: Path, keys: list[bytes]) -> dict[bytes, np.ndarray]:
    """Of the keys, those that are there and whole: a damaged row is computed again."""
    found = {}
    with closing(_opened(path)) as connection:
        for key in keys:
            stored = connection.execute("SELECT row, sha256 FROM rows WHERE key = ?", [key]).fetchone()
            if stored is not None and hashlib.sha256(key + stored[0]).digest() == stored[1]:
                found[key] = np.frombuffer(stored[0], np.float32)
    return found


def write(path: Path, rows: dict[bytes, np.ndarray]) -> None:
    made = [(key, row.tobytes(), hashlib.sha256(key + row.tobytes()).digest()) for key, row in rows.items()]
    with closing(_opened(path)) as connection, connection:
        connection.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", made)
