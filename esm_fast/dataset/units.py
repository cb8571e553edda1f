"""One unit's files: per-residue numbers first, then the pooled table, whose name says that the unit is done."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .. import _C
from ..files.atomic import committed
from . import layout
from .errors import DatasetError
from .layout import pa
from .plan import Plan

_LONGEST_HEADER = 1 << 20  # bytes, of a few arrays
_NAMES = {"float32": "F32", "float16": "F16"}  # of safetensors


@dataclass
class Unit:
    """The sequences of a unit."""

    number: int
    digests: list[bytes]
    lengths: np.ndarray
    sequences: list[str]


@dataclass(eq=False)
class Results:
    """Of a unit: a status a sequence, and the numbers; a sequence that has none has NaN in place of them."""

    unit: Unit
    status: list[str]
    pooled: dict[int, np.ndarray] = field(default_factory=dict)  # layer -> (sequences, width)
    residues: dict[int, np.ndarray] = field(default_factory=dict)  # layer -> (all residues, width)


class Checksums(NamedTuple):
    """Of each sequence's residues: what one lookup compares, which a SHA-256 of the whole file cannot tell it."""

    sums: np.ndarray  # uint64 (layers, sequences), little-endian in files

    @classmethod
    def of(cls, results: Results) -> "Checksums":
        bounds = np.concatenate([[0], np.cumsum(results.unit.lengths)])
        sums = [
            _C.piece_checksums(memoryview(np.ascontiguousarray(rows)).cast("B"), bounds * rows[:1].nbytes)
            for rows in results.residues.values()
        ]
        return cls(np.stack(sums))

    @classmethod
    def read(cls, text: bytes, layers: int) -> "Checksums":
        """Raises ValueError where it is not what `text` gave."""
        return cls(np.frombuffer(base64.b64decode(text, validate=True), "<u8").reshape(layers, -1))

    def text(self) -> str:
        return base64.b64encode(self.sums.astype("<u8").tobytes()).decode()

    def fits(self, layer: int, at: int, rows: np.ndarray) -> bool:
        """layer, at: their places among those stored."""
        (found,) = _C.piece_checksums(memoryview(rows).cast("B"), np.array([0, rows.nbytes]))
        return found == self.sums[layer, at]


class Sequences:
    """The sequences of a plan, unit by unit."""

    def __init__(self, plan: Plan):
        self._path = plan.folder / layout.SEQUENCES
        self._file = layout.open_table(self._path, layout.SEQUENCE_FIELDS)

    def unit(self, number: int) -> Unit:
        group = layout.read_group(self._file, self._path, number)
        lengths = np.array(group["length"].to_pylist(), dtype=np.int64)
        return Unit(number, group["digest"].to_pylist(), lengths, group["sequence"].to_pylist())


def write(plan: Plan, results: Results) -> int:
    """Commits a unit's files; returns their bytes."""
    unit, settings = results.unit, plan.settings
    metadata, size = {"plan": plan.id, "unit": str(unit.number)}, 0
    if settings.residues:
        path = layout.residues_path(plan.folder, unit.number)
        arrays = {f"layer_{layer}": rows for layer, rows in results.residues.items()}
        arrays["offsets"] = np.concatenate([[0], np.cumsum(unit.lengths)]).astype(np.int64)
        with committed(path, check=lambda written: residue_shape(written, path)) as output:
            output.write(save(arrays, metadata={"plan": plan.id}))  # one entry: safetensors has no order among several
        size = output.tell()
        metadata |= {"residues_sha256": output.sha256, "residues_bytes": str(size)}
        metadata["residues_checksums"] = Checksums.of(results).text()
    path = layout.pooled_path(plan.folder, unit.number)
    columns = [unit.digests, unit.lengths, results.status]
    columns += [_column(rows, results.status) for rows in results.pooled.values()]
    with layout.table(path, fields_of(plan), metadata, compression="none") as table:
        table.add(columns)
    return size + path.stat().st_size


def _column(rows: np.ndarray, status: list[str]) -> pa.Array:
    """FixedSizeList; null for a sequence without numbers."""
    missing = pa.array([not has_numbers(word) for word in status])
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1], mask=missing)


def matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """(rows, width); NaN where there are no numbers."""
    rows = column.combine_chunks()
    there, numbers = rows.is_valid().to_numpy(zero_copy_only=False), rows.flatten().to_numpy().reshape(-1, width)
    if there.all():
        return numbers
    full = np.full((len(rows), width), np.nan, numbers.dtype)
    full[there] = numbers
    return full


def has_numbers(status: str) -> bool:
    return status in (layout.OK, layout.RECOMPUTED)


def fields_of(plan: Plan) -> list:
    settings = plan.settings
    return layout.pooled_fields(settings.layers, settings.width, settings.store)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a library says of a file that is not as it was written becomes a DatasetError."""
    try:
        yield
    except DatasetError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, pa.ArrowException) as error:
        raise layout.damaged(path, error) from None


def is_done(plan: Plan, unit: int) -> bool:
    """Whether a unit's files are there, of this plan, and of the right size; `verify` reads all of them."""
    path = layout.pooled_path(plan.folder, unit)
    with suppress(DatasetError), reading(path):
        with open_pooled(plan, unit) as file:
            metadata = file.schema_arrow.metadata
        size = layout.residues_path(plan.folder, unit).stat().st_size if plan.settings.residues else 0
        return size == int(metadata.get(b"residues_bytes", 0))
    return False


def open_pooled(plan: Plan, unit: int, *, whole: bool = False):
    """Raises DatasetError where it is not this plan's table of the unit. whole: see `layout.open_table`."""
    path = layout.pooled_path(plan.folder, unit)
    file = layout.open_table(path, whole=whole)
    schema = file.schema_arrow
    metadata = schema.metadata or {}
    if (metadata.get(b"plan"), metadata.get(b"unit")) != (plan.id.encode(), str(unit).encode()):
        raise DatasetError(f"{path} belongs to another plan or unit")
    if not schema.equals(pa.schema(fields_of(plan))) or file.num_row_groups != 1:
        raise DatasetError(f"{path} has other columns than its plan")
    if file.metadata.num_rows != plan.info["unit_rows"][unit]:
        raise DatasetError(f"{path} has {file.metadata.num_rows} rows, and not {plan.info['unit_rows'][unit]}")
    return file


def read_residues(path: Path, layer: int, bounds: tuple[int, int], shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Some of the rows of a layer, which has this shape and type, read into memory of their own.

    safetensors would copy them three times, out of a map, which ends the process where a file is cut meanwhile.

    Raises:
        ValueError, LookupError, TypeError: the file has no such layer.
    """
    stored = np.dtype(dtype).newbyteorder("<")
    with path.open("rb") as file:  # buffered: a raw file may give less than it has, above 2 GB always
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError("its header is too long")
        entry = json.loads(file.read(length).decode())[f"layer_{layer}"]
        begin = entry["data_offsets"][0]
        wanted = [begin, begin + shape[0] * shape[1] * stored.itemsize]
        if entry != {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": wanted} or begin < 0:
            raise ValueError(f"its layer {layer} is not {shape}, {dtype}")
        rows = np.empty((bounds[1] - bounds[0], shape[1]), stored)
        file.seek(8 + length + begin + bounds[0] * rows.strides[0])
        if file.readinto(rows) != rows.nbytes:
            raise ValueError("it ends before its rows do")
    return rows


def residue_shape(path: Path, name: Path) -> dict[str, list[int]]:
    """The shape of each array. Raises DatasetError."""
    with reading(name), safe_open(path, "numpy") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
