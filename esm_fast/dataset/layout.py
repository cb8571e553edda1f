"""The files of a data set: their names, their tables, and how they are written. docs/embedding.md describes them."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    raise ImportError(
        "a data set needs pyarrow: pip install 'esm_fast[dataset]'; one HDF5 file (-o NAME.h5) does not"
    ) from None

from ..files.atomic import Output, committed
from .errors import DatasetError

FORMAT = "esm_fast data set 1"
PLAN, RUN, LOCK = "plan.json", "run.json", ".plan.lock"
SEQUENCES, IDS, SKIPPED = "sequences.parquet", "ids.parquet", "skipped.parquet"
POOLED, RESIDUES = "pooled", "residues"
TABLES = (SEQUENCES, IDS, SKIPPED)

DIGEST = pa.binary(32)  # SHA-256 of a sequence as it was computed: upper-case letters, <mask> for a mask
SEQUENCE_FIELDS = [("digest", DIGEST), ("length", pa.int32()), ("sequence", pa.large_string())]
ID_FIELDS = [
    ("record", pa.int64()),  # number in the input, from 0, all files together
    ("id", pa.large_string()),
    ("header", pa.large_string()),
    ("row", pa.int64()),  # of its sequence, in sequences.parquet and over all shards
    ("digest", DIGEST),
]
SKIPPED_FIELDS = [
    ("record", pa.int64()),
    ("source", pa.int32()),  # number of the input file, from 0
    ("line", pa.int64()),  # of its header, from 1
    ("id", pa.large_string()),
    ("reason", pa.string()),
    ("detail", pa.large_string()),
]
OK = "ok"  # the status of a row; others are "float32" (computed again in it), and reasons for having no numbers
RECOMPUTED = "float32"
_PATHS = 256  # held: to make one takes as long as the checksum of a protein's residues


@lru_cache(_PATHS)
def pooled_path(folder: Path, unit: int) -> Path:
    return folder / POOLED / f"part-{unit:06d}.parquet"


@lru_cache(_PATHS)
def residues_path(folder: Path, unit: int) -> Path:
    return folder / RESIDUES / f"part-{unit:06d}.safetensors"


def pooled_fields(layers: list[int], width: int, store: str) -> list:
    """digest, length, status, and a column a layer: layer_33 FixedSizeList<float>[1280]."""
    number = {"float32": pa.float32(), "float16": pa.float16()}[store]
    columns = [(f"layer_{layer}", pa.list_(number, width)) for layer in layers]
    return [("digest", DIGEST), ("length", pa.int32()), ("status", pa.string()), *columns]


class Table:
    """A Parquet file being written, one row group a call; the same rows give the same bytes."""

    def __init__(self, output: Output | io.BytesIO, fields: list, metadata: dict[str, str], compression: str):
        self.schema = pa.schema(fields, metadata=metadata)
        self._writer = pq.ParquetWriter(
            pa.PythonFile(output, mode="w"),
            self.schema,
            compression=compression,
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )

    def add(self, columns: list) -> None:
        arrays = [
            column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column, field.type)
            for column, field in zip(columns, self.schema, strict=True)
        ]
        table = pa.Table.from_arrays(arrays, schema=self.schema)
        self._writer.write_table(table, row_group_size=max(1, len(table)))

    def close(self) -> None:
        self._writer.close()


def encoded(rows: pa.Table, fields: list) -> bytes:
    """The file of one row group that these rows make, uncompressed; fields as they were written."""
    output = io.BytesIO()
    writer = Table(output, fields, rows.schema.metadata, "none")
    writer.add(rows.cast(pa.schema(fields)).columns)
    writer.close()
    return output.getvalue()


@contextmanager
def table(path: Path, fields: list, metadata: dict[str, str], *, compression: str = "zstd") -> Iterator[Table]:
    with committed(path, check=lambda written: open_table(written).close()) as output:
        writer = Table(output, fields, metadata, compression)
        yield writer
        writer.close()


def open_table(path: Path, fields: list | None = None, *, whole: bool = False) -> pq.ParquetFile:
    """Every page is checked against its checksum when it is read. Raises DatasetError, also for other columns.

    whole: all of it will be read, so the file is at once; a column at a time costs more than the checksums do.
    """
    try:
        source = pa.BufferReader(path.read_bytes()) if whole else path
        file = pq.ParquetFile(source, page_checksum_verification=True)
        if fields is not None and not file.schema_arrow.equals(pa.schema(fields)):
            raise DatasetError(f"{path} is damaged: it has other columns than were written")
        return file
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing") from None
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from None


def row_groups(file: pq.ParquetFile, path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """One at a time. Raises DatasetError for a page that is not as it was written."""
    for group in range(file.num_row_groups):
        yield read_group(file, path, group, columns)


def read_group(file: pq.ParquetFile, path: Path, group: int, columns: list[str] | None = None) -> pa.Table:
    try:
        return file.read_row_group(group, columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> DatasetError:
    return DatasetError(f"{path} is damaged ({' '.join(str(error).split())})")
