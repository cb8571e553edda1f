"""Tables as spreadsheets, pandas and R write them: rows by the names of their columns, each with its line."""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .compression import DamagedStreamError, Decompressed, named

_SEPARATORS = "\t,;"
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
_INDEX = ("", "Unnamed: 0")  # what pandas calls the index that it writes as a column

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a protein in a cell is longer than the default


class TableError(ValueError):
    """A table that cannot be read; the message names the file and the line."""


class Row(NamedTuple):
    line: int  # its last, from 1
    values: dict[str, str]


class Table(NamedTuple):
    columns: list[str]
    rows: Iterator[Row]


def read_table(path: str | Path, *, separator: str | None = None, quotes: bool = True) -> Table:
    """Reads a table with a header line: separated by tabs, commas or semicolons, whichever line 1 has most of.

    Plain, gz, bz2, xz or zst; UTF-8 with or without a byte-order mark, or UTF-16 with one. A column that is pandas'
    index, the first and without a name, is left out. Rows are read as they are asked for.

    separator: the one to take. quotes: False where a quote is a character like others, as in UniProt's tables.

    Raises TableError, OSError; iterating over the rows too.
    """
    path = Path(path)
    lines = _lines(path)
    first = next(lines, "")
    if not first.strip():
        raise TableError(f"{path}: line 1 names 0 columns; it must name them all")
    separator = separator or max(_SEPARATORS, key=first.count)
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    read = csv.reader(_from(first, lines), delimiter=separator, quoting=quoting, strict=True)
    columns = _record(path, read)
    skip = 1 if len(columns) > 1 and columns[0] in _INDEX else 0
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise TableError(f"{path}: line 1 names the column {twice[0]!r} twice")
    return Table(columns[skip:], _rows(path, read, columns, skip))


def _rows(path: Path, read, columns: list[str], skip: int) -> Iterator[Row]:
    while (record := _record(path, read)) is not None:
        if not record:
            continue
        if len(record) != len(columns):
            raise TableError(
                f"{path}: line {read.line_num}: it has not as many columns as line 1, "
                f"{len(record)} in the place of {len(columns)}"
            )
        yield Row(read.line_num, dict(zip(columns[skip:], record[skip:], strict=True)))


def _record(path: Path, read) -> list[str] | None:
    begun = read.line_num + 1
    try:
        return next(read, None)
    except csv.Error as error:
        why = "a quote that opens there is never closed" if "end of data" in str(error) else str(error)
        raise TableError(f"{path}: line {begun}: {why}") from None


def _from(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file, named(str(path)):
        stream = io.BufferedReader(Decompressed(file))
        number = 0
        try:
            head = stream.peek(3)[:3]
            encoding = next((name for start, name in _MARKS.items() if head.startswith(start)), "utf-8")
            for number, line in enumerate(_decoded(stream, encoding), start=1):
                if "\0" in line:
                    raise TableError(f"{path}: line {number} holds a NUL character: this is no table of text")
                yield line
        except UnicodeDecodeError:
            raise TableError(f"{path}: line {number + 1} is not UTF-8; save the table as UTF-8") from None
        except DamagedStreamError as error:
            raise TableError(f"{path}: {error}") from None


def _decoded(stream: io.BufferedReader, encoding: str) -> Iterator[str]:
    """Lines with their ends, whichever of the three they are. UTF-8 line by line, so that it is known which is not."""
    if encoding == "utf-16":
        yield from io.TextIOWrapper(stream, encoding=encoding, newline="")
        return
    for number, line in enumerate(stream):
        text = line.decode("utf-8-sig" if number == 0 else "utf-8")
        yield from io.StringIO(text, newline="")
