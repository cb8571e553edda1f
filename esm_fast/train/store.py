"""A token store: the proteins of FASTA files, one byte a residue, memory-mapped; made once, read in any order.

A store is a folder: `tokens` (uint8, without <cls> and <eos>), `offsets` (int64: record i is tokens[offsets[i] :
offsets[i + 1]]), `valid` (uint8: 1 for records held out), `names.txt` (an id a line) and `store.json` (version, counts,
size and SHA-256 of each file). Made with clusters, it has `members` (int64: the records for training, cluster by
cluster) and `clusters` (int64: those of cluster c are members[clusters[c] : clusters[c + 1]]) too. Numbers are
little-endian.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files.checksums import sha256
from ..files.shapes import count, digest, require

VERSION = 1
CLUSTER_FILES = {"members": "<i8", "clusters": "<i8"}
FILES = {"tokens": "<u1", "offsets": "<i8", "valid": "<u1", "names.txt": None}


class StoreError(ValueError):
    """A token store that is damaged or no token store; the message names the file."""


@dataclass(frozen=True)
class Store:
    path: Path
    info: dict  # store.json
    tokens: np.ndarray
    offsets: np.ndarray
    valid: np.ndarray
    members: np.ndarray | None = None
    clusters: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.valid)

    @property
    def lengths(self) -> np.ndarray:
        """Residues of each record; 8 bytes a record."""
        return np.diff(self.offsets)

    def tokens_of(self, records: np.ndarray, limit: int) -> np.ndarray:
        """Tokens of records as a model sees them: cropped to `limit` residues, with <cls> and <eos>."""
        return np.minimum(self.lengths_of(records), limit) + 2

    def lengths_of(self, records: np.ndarray) -> np.ndarray:
        """Residues of some records."""
        return self.offsets[np.asarray(records) + 1] - self.offsets[records]

    def records(self, *, valid: bool) -> np.ndarray:
        """The numbers of the records of a split."""
        return np.flatnonzero(self.valid == valid)

    def names(self) -> list[str]:
        return (self.path / "names.txt").read_text(encoding="utf-8").split("\n")[:-1]

    @property
    def identity(self) -> str:
        """A checksum of everything in it."""
        return hashlib.sha256(json.dumps(self.info["files"], sort_keys=True).encode()).hexdigest()


_COUNTS = {"residues": count, "train": count, "valid": count, "train_residues": count, "valid_residues": count}
_SHAPE = {"version": int, "files": {name: {"bytes": count, "sha256": digest} for name in FILES}, "counts": _COUNTS}


def open_store(path: str | Path, *, verify: bool = False) -> Store:
    """Maps a store. Sizes are checked; with `verify` every byte is, against its checksum.

    Raises FileNotFoundError, StoreError.
    """
    path = Path(path)
    if not (path / "store.json").exists():
        raise FileNotFoundError(f"{path} is no token store: it has no store.json; make one with 'esm-fast prepare'")
    try:
        info = json.loads((path / "store.json").read_text(encoding="utf-8"))
        require(info, _SHAPE, str(path / "store.json"))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path / 'store.json'} cannot be read ({error}); prepare the store again") from None
    version, files = info["version"], info["files"]
    if version != VERSION:
        raise StoreError(f"{path} has version {version}, this esm_fast reads {VERSION}; prepare the store again")
    there = dict(FILES)
    if set(CLUSTER_FILES) & set(files):
        try:
            require(files, {name: {"bytes": count, "sha256": digest} for name in CLUSTER_FILES}, "files")
        except ValueError as error:
            raise StoreError(f"{path / 'store.json'} cannot be read ({error}); prepare the store again") from None
        there |= CLUSTER_FILES
    for name in there:
        file = path / name
        if not file.exists() or file.stat().st_size != files[name]["bytes"]:
            raise StoreError(f"{file} is missing or cut short; prepare the store again")
        if verify and sha256(file) != files[name]["sha256"]:
            raise StoreError(f"{file} is damaged: it does not match its checksum; prepare the store again")
    arrays = {name: _mapped(path / name, dtype) for name, dtype in there.items() if dtype}
    return Store(path, info, **arrays)


def open_stores(paths: str | dict[str, float]) -> Store | list[tuple[Store, float]]:
    """The store or the stores, with weights, of a recipe."""
    if isinstance(paths, str):
        return open_store(paths)
    return [(open_store(path), weight) for path, weight in paths.items()]


def describe(folder: Path, counts: dict) -> None:
    """Writes store.json, which makes a folder with the other files a store."""
    names = [*FILES, *(name for name in CLUSTER_FILES if (folder / name).exists())]
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    info = {"format": "esm_fast token store", "version": VERSION, "files": files, "counts": counts}
    (folder / "store.json").write_text(json.dumps(info, indent=2) + "\n")


def _mapped(file: Path, dtype: str) -> np.ndarray:
    """An ordinary array over the mapped file: the subclass np.memmap would slow every small index."""
    if not file.stat().st_size:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(file, dtype, "r"))
