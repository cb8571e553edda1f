"""Tables of variants: CSV, TSV, Parquet, lists of one variant a line; plain or compressed, told apart by content.

A table is read as often as it is needed, a row at a time, and its cells stay the text that they were.
"""

import csv
import gzip
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..sequences.compression import DamagedStreamError, Decompressed, named
from .parse import VariantError, parse

PARQUET = b"PAR1"
_NO_TEXT = {  # first bytes of what people take for a table
    b"PK\x03\x04": "an Excel workbook or a zip archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"\x89HDF": "HDF5",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_DELIMITERS = "\t,;"


class TableError(ValueError):
    """A table that cannot be used; the message names file and line, and what to do."""


class Table:
    """columns; `rows()` gives lists of as many cells; comments: lines with # before the header, as they were."""

    def __init__(self, path: Path):
        self.path, self.comments = path, []
        with path.open("rb") as file:
            start = file.read(4)
        self.is_parquet = start == PARQUET
        if start in _NO_TEXT:
            raise TableError(f"{path} is {_NO_TEXT[start]}; save the table as CSV (UTF-8) or Parquet")
        if self.is_parquet:
            self.columns = _parquet(path).schema_arrow.names
            return
        with self._text() as text:
            self._skip, header = self._comments_of(text)
            self.delimiter = next((d for d in _DELIMITERS if d in header), ",")
            cells = next(csv.reader([header], delimiter=self.delimiter, strict=True), [])
        self.is_list = not any(cells) or _is_variant(header.strip()) or _is_variant(cells[0])
        self.columns = ["mutant"] if self.is_list else cells
        if self.is_list and header.strip() == "":
            raise TableError(f"{path}: the file is empty, or line 1; give one variant a line, or a table with a header")

    def _comments_of(self, text) -> tuple[int, str]:
        """How many lines stand before the header, and the header."""
        for number, line in enumerate(text):
            if not line.startswith("#"):
                return number, line.rstrip("\r\n")
            self.comments.append(line.rstrip("\r\n"))
        return 0, ""

    @contextmanager
    def _text(self) -> Iterator[io.TextIOBase]:
        try:
            with self.path.open("rb") as file, named(str(self.path)):
                stream = io.BufferedReader(Decompressed(file))
                encoding = "utf-16" if stream.peek(2)[:2] in _UTF16 else "utf-8-sig"
                yield io.TextIOWrapper(stream, encoding=encoding, newline="")
        except UnicodeError as error:
            raise TableError(f"{self.path}: no table that can be read: {error}; save it as CSV in UTF-8") from None
        except (csv.Error, DamagedStreamError) as error:
            raise TableError(f"{self.path}: no table that can be read: {error}") from None

    def rows(self) -> Iterator[list[str]]:
        """Raises TableError for a row of another length, and for bytes that are no text."""
        if self.is_parquet:
            yield from self._parquet_rows()
            return
        with self._text() as text:
            for _ in range(self._skip + (not self.is_list)):
                next(text)
            if self.is_list:
                yield from ([line.strip()] for line in text if line.strip())
            else:
                yield from self._csv_rows(text)

    def _csv_rows(self, text) -> Iterator[list[str]]:
        # strict: else a quote that is never closed swallows the rows behind it
        reader = csv.reader(text, delimiter=self.delimiter, strict=True)
        while True:
            line = reader.line_num + self._skip + 2
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise TableError(
                    f"{self.path}: the row at line {line} cannot be read: {error}; look at its quotes"
                ) from None
            if row is None:
                return
            if row and len(row) != len(self.columns):
                raise TableError(f"{self.path}: line {line} has {len(row)} cells, and the header {len(self.columns)}")
            if row:
                yield row

    def _parquet_rows(self) -> Iterator[list[str]]:
        file = _parquet(self.path)
        for group in range(file.num_row_groups):
            with named(str(self.path)):
                columns = [column.to_pylist() for column in file.read_row_group(group).columns]
            yield from ([_text(cell) for cell in row] for row in zip(*columns, strict=True))


def _text(cell) -> str:
    """bytes are text, as some programs write it into Parquet."""
    return "" if cell is None else cell.decode("utf-8", "replace") if isinstance(cell, bytes) else str(cell)


def _is_variant(text: str) -> bool:
    try:
        parse(text)
    except VariantError:
        return False
    return True


def _parquet(path: Path):
    return _pyarrow().parquet.ParquetFile(path, page_checksum_verification=True)


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install 'esm_fast[dataset]'; CSV does not") from None
    return pyarrow


# ---- writing

ENDINGS = (".csv", ".tsv", ".txt", ".parquet", ".csv.gz", ".tsv.gz")


class Rows:
    """Takes rows: called with one; `texts` takes many, of text alone, and `write` whole lines with `delimiter` between
    the cells. These are None in Parquet."""

    def __init__(
        self,
        one: Callable[[list], None],
        texts: Callable[[Iterable], None] | None = None,
        write: Callable[[str], int] | None = None,
        delimiter: str | None = None,
    ):
        self._one, self.texts, self.write, self.delimiter = one, texts, write, delimiter

    def __call__(self, row: list) -> None:
        self._one(row)


@contextmanager
def writer(path: Path, name: str, columns: list[str], numbers: set[str], comments: list[str] = ()):
    """Yields `Rows`: cells of text, and of `numbers` floats. The form is that of `name`'s ending.

    A number that is not there (NaN) is an empty cell, in Parquet a null.
    """
    if name.endswith(".parquet"):
        with _parquet_writer(path, columns, numbers) as add:
            yield Rows(add)
        return
    delimiter = "\t" if name.removesuffix(".gz").endswith((".tsv", ".txt")) else ","
    with _opened(path, name.endswith(".gz")) as file:
        file.writelines(f"{comment}\n" for comment in comments)
        table = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        table.writerow(columns)

        def add(row: list) -> None:
            table.writerow([number(cell) if isinstance(cell, float) else cell for cell in row])

        yield Rows(add, table.writerows, file.write, delimiter)


def quoted(cell: str, delimiter: str) -> str:
    """A cell of text as the table has it."""
    line = io.StringIO()
    csv.writer(line, delimiter=delimiter, lineterminator="").writerow([cell])
    return line.getvalue()


def number(value: float) -> str:
    """With as many digits as the published tables have."""
    return "" if value != value else f"{value:.6f}"


@contextmanager
def _opened(path: Path, compressed: bool) -> Iterator[io.TextIOBase]:
    with path.open("wb") as raw:
        binary = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if compressed else raw  # the same bytes at any time
        text = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        yield text
        text.flush()
        text.detach()
        if compressed:
            binary.close()


@contextmanager
def _parquet_writer(path: Path, columns: list[str], numbers: set[str]):
    pa = _pyarrow()
    schema = pa.schema([(name, pa.float64() if name in numbers else pa.string()) for name in columns])
    waiting: list[list] = []

    def flush() -> None:
        arrays = [
            pa.array(cells, field.type, from_pandas=True)  # NaN is null
            for cells, field in zip(zip(*waiting, strict=True), schema, strict=True)
        ]
        file.write_table(pa.Table.from_arrays(arrays, schema=schema))
        waiting.clear()

    def add(row: list) -> None:
        waiting.append(row)
        if len(waiting) == 1 << 16:
            flush()

    with pa.parquet.ParquetWriter(path, schema) as file:
        yield add
        if waiting:
            flush()
