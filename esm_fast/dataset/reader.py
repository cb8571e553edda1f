"""Reading a data set: nothing is in memory before it is asked for."""

import itertools
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files.checksums import sha256
from . import layout, units
from .errors import DatasetError
from .plan import Plan, load, require_planned

_OPEN_UNITS = 4  # pooled tables held; neighbours in the input are neighbours there


class Item(NamedTuple):
    """A protein of the input."""

    id: str
    sequence: str
    embedding: np.ndarray | None  # (width,), of the last layer stored; None where the status says why


class _Pooled(NamedTuple):
    """A shard in memory."""

    status: list[str]
    layers: dict[int, np.ndarray]  # (sequences, width)
    ends: np.ndarray  # (sequences + 1,): where each one's residues end, from 0
    residues_sha256: str  # of the unit's file of residues, where there is one
    checksums: units.Checksums | None  # of each sequence's residues; None in data sets made before there were any


class Dataset:
    """Embeddings by number or id, in the order of the input: records that were skipped are not among them.

    `dataset["P12345"]` and `dataset[7]` give (width,), of the last layer stored; `embedding`, `residues` and `matrix`
    take a layer. A protein without numbers raises DatasetError, which says why; `status` says it without raising.
    """

    SCORES = False  # whether the numbers are variants' scores

    def __init__(self, folder: str | Path):
        self.plan: Plan = load(Path(folder).absolute())  # whatever the current folder is later
        if bool(self.plan.settings.scan) != self.SCORES:
            kinds = ("embeddings, for esm_fast.open", "variants' scores, for esm_fast.variants.Atlas")
            raise DatasetError(f"{folder} is a data set of {kinds[not self.SCORES]}")
        self.folder, self.layers = self.plan.folder, list(self.plan.settings.layers)
        self._ends = list(itertools.accumulate(self.plan.info["unit_rows"], initial=0))
        self._pooled = lru_cache(_OPEN_UNITS)(self._read_pooled)
        self._verified: dict[int, tuple] = {}  # files of residues -> inode, size and time of what was compared
        # Open from now on: what is put in their place later is another data set's.
        self._ids_file = layout.open_table(self.folder / layout.IDS, layout.ID_FIELDS)
        self._sequences_file = units.Sequences(self.plan)
        self._unit = lru_cache(_OPEN_UNITS)(self._read_unit)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        settings, info = self.plan.settings, self.plan.info
        what = f"{len(self)} proteins, layers {self.layers}, {settings.pool}, {settings.store}"
        return f"<esm_fast data set {self.folder}: {what}, model {info['model']}>"

    @cached_property
    def ids(self) -> list[str]:
        return self._column("id").to_pylist()

    @cached_property
    def headers(self) -> list[str]:
        return self._column("header").to_pylist()

    @cached_property
    def rows(self) -> np.ndarray:
        """The row of each protein's sequence, over all shards."""
        return self._column("row").to_numpy()

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.ids)}

    def _column(self, name: str):
        return layout.pa.chunked_array([group[name].combine_chunks() for group in self._id_groups([name])])

    def _id_groups(self, columns: list[str]):
        yield from layout.row_groups(self._ids, self.folder / layout.IDS, columns)

    @cached_property
    def _ids(self):
        require_planned(self.plan, layout.IDS)
        return self._ids_file

    @cached_property
    def _sequences(self) -> units.Sequences:
        require_planned(self.plan, layout.SEQUENCES)
        return self._sequences_file

    def _read_unit(self, unit: int) -> units.Unit:
        return self._sequences.unit(unit)

    # ---- one protein

    def __contains__(self, key: str) -> bool:
        return key in self._numbers

    def __getitem__(self, key: int | str) -> np.ndarray:
        return self.embedding(key)

    def __iter__(self) -> Iterator[Item]:
        """In the order of the input, which is that of the shards but for sequences that were met before."""
        for group in self._id_groups(["id", "row"]):
            for name, row in zip(group["id"].to_pylist(), group["row"].to_pylist(), strict=True):
                unit, at = self._place(row)
                there = units.has_numbers(self._pooled(unit).status[at])
                embedding = self._pooled(unit).layers[self.layers[-1]][at] if there else None
                yield Item(name, self._unit(unit).sequences[at], embedding)

    def number(self, key: int | str) -> int:
        """The number of an id, or of a number that may count from the end. Raises KeyError, IndexError."""
        if isinstance(key, str):
            return self._numbers[key]
        if not -len(self) <= key < len(self):
            raise IndexError(f"{key}: the data set has {len(self)} proteins")
        return int(key) % len(self)

    def embedding(self, key: int | str, layer: int = -1) -> np.ndarray:
        pooled, _, at = self._with_numbers(key)
        return pooled.layers[self._layer(layer)][at]

    def residues(self, key: int | str, layer: int = -1) -> np.ndarray:
        """(residues, width), read from the disk at each call; data sets made with --residues have them.

        They are compared with the checksum that they were written with. Of data sets made before there was one a
        protein, a unit's whole file is compared with its SHA-256 when it is read first, and when it has changed.
        """
        if not self.plan.settings.residues:
            raise DatasetError(f"{self.folder} has no residues: it was made without --residues")
        pooled, unit, at = self._with_numbers(key)
        number = self._layer(layer)
        path = layout.residues_path(self.folder, unit)
        with units.reading(path):
            if pooled.checksums is None:
                self._verify_residues(path, unit)
            bounds = int(pooled.ends[at]), int(pooled.ends[at + 1])
            shape, store = (int(pooled.ends[-1]), self.plan.settings.width), self.plan.settings.store
            rows = units.read_residues(path, number, bounds, shape, store)
            right = pooled.checksums is None or pooled.checksums.fits(self.layers.index(number), at, rows)
        if not right:
            raise DatasetError(f"{path} is damaged: the residues of {key!r} are not those that were written")
        return rows

    def sequence(self, key: int | str) -> str:
        """As it was computed: upper-case, cut where --overlength truncate cut it."""
        unit, at = self._place(self.rows[self.number(key)])
        return self._unit(unit).sequences[at]

    def status(self, key: int | str) -> str:
        """ "ok", "float32" (computed again in it), or why there are no numbers."""
        unit, at = self._place(self.rows[self.number(key)])
        return self._pooled(unit).status[at]

    # ---- many

    def matrix(self, layer: int = -1) -> np.ndarray:
        """(proteins, width) in the order of the input; NaN for proteins without numbers."""
        return np.concatenate([rows for _, rows in self.blocks(layer)])[self.rows]

    def torch(self, layer: int = -1):
        """`matrix` as a tensor."""
        import torch

        return torch.from_numpy(self.matrix(layer))

    def arrow(self):
        """The distinct sequences' tables as one pyarrow.dataset.Dataset, unread: for scans, filters, pandas, DuckDB.

        Pages are compared with their checksums when they are scanned; that every table is its unit's, here.
        """
        from pyarrow import dataset

        for unit in range(self.plan.units):
            units.open_pooled(self.plan, unit).close()
        paths = [str(layout.pooled_path(self.folder, unit)) for unit in range(self.plan.units)]
        checked = dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
        return dataset.dataset(paths, format=dataset.ParquetFileFormat(default_fragment_scan_options=checked))

    def blocks(self, layer: int = -1) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, (rows, width)) of the distinct sequences, a shard at a time; NaN where there are no numbers."""
        number = self._layer(layer)
        for unit in range(self.plan.units):
            yield self._ends[unit], self._read_pooled(unit).layers[number]

    # ---- where things are

    def _place(self, row: int) -> tuple[int, int]:
        """Unit, and place in it, of a sequence."""
        unit = bisect_right(self._ends, row) - 1
        return unit, int(row) - self._ends[unit]

    def _with_numbers(self, key: int | str) -> tuple[_Pooled, int, int]:
        """A unit's table, its number, and a protein's place in it."""
        unit, at = self._place(self.rows[self.number(key)])
        pooled = self._pooled(unit)
        if not units.has_numbers(status := pooled.status[at]):
            raise DatasetError(f"{key!r} has no embedding: {status}")
        return pooled, unit, at

    def _verify_residues(self, path: Path, unit: int) -> None:
        """Raises DatasetError for a file that is not the one that was written with the unit's pooled table."""
        status = path.stat()
        found = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._verified.get(unit) != found:
            if sha256(path) != self._pooled(unit).residues_sha256:
                raise DatasetError(f"{path} is damaged: its SHA-256 is not the one that its unit was written with")
            self._verified[unit] = found

    def _layer(self, layer: int) -> int:
        """-1 is the last one stored. Raises KeyError."""
        number = self.layers[layer] if -len(self.layers) <= layer < 0 else layer
        if number not in self.layers:
            raise KeyError(f"layer {layer} is not stored; there are {self.layers}")
        return number

    def _read_pooled(self, unit: int) -> _Pooled:
        path, width = layout.pooled_path(self.folder, unit), self.plan.settings.width
        with units.open_pooled(self.plan, unit, whole=True) as file:
            group = layout.read_group(file, path, 0)
        layers = {layer: units.matrix(group[f"layer_{layer}"], width) for layer in self.layers}
        metadata = group.schema.metadata or {}
        with units.reading(path):
            text = metadata.get(b"residues_checksums")
            checksums = None if text is None else units.Checksums.read(text, len(self.layers))
        ends = np.concatenate([[0], np.cumsum(group["length"].to_numpy())])
        digest = metadata.get(b"residues_sha256", b"").decode()
        return _Pooled(group["status"].to_pylist(), layers, ends, digest, checksums)


def open(folder: str | Path) -> Dataset:
    """Opens a data set of `esm-fast embed -o FOLDER/`; if it is not finished, what is there. Raises DatasetError."""
    return Dataset(folder)
