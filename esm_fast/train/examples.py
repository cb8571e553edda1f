"""Labelled proteins for fine-tuning, as people keep them: tables, Parquet, FASTA, rows of Python."""

import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..sequences.compression import DamagedStreamError, Decompressed, decompress
from ..sequences.fasta import FastaError, Records, read_fasta
from ..sequences.names import identifier
from ..sequences.table import TableError, read_table
from ..sequences.tokenize import Policy, Report, Tokens, tokenize

SPLITS = ("train", "valid", "test")
# How programs write that there is no label; a model would learn such a word as a class.
MISSING = ("", "nan", "na", "n/a", "#n/a", "null", "none", "<na>")
_SPLIT_NAMES = {"training": "train", "val": "valid", "validation": "valid", "dev": "valid", "testing": "test"}
_COLUMNS = {  # what a column is taken for without being told, in any case
    "id": ("id", "name", "identifier", "accession", "entry"),
    "sequence": ("sequence", "seq", "protein", "protein_sequence", "aa_seq", "aa_sequence"),
    "label": ("label", "target", "y"),
    "split": ("split", "set", "stage"),
}
_PAIR = re.compile(r"([\w.-]+)=(\S*)")


class ExamplesError(ValueError):
    """Examples that cannot be used; the message says where."""


@dataclass(frozen=True)
class Example:
    """A protein. labels: by the names of their columns, "" where one is missing: a number or a class; at the residue
    level a letter a residue, or numbers between spaces. split: one of SPLITS, or "" for one that is to be given.
    where: for messages. partner, partner_name: the second protein, where examples are pairs.
    """

    name: str
    sequence: str
    labels: Mapping[str, str]
    split: str = ""
    where: str = ""
    line: int = 0
    partner: str = ""
    partner_name: str = ""

    @property
    def place(self) -> str:
        return self.where or self.name

    @property
    def proteins(self) -> tuple[str, ...]:
        """The sequences."""
        return (self.sequence, self.partner) if self.partner else (self.sequence,)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the proteins."""
        return (self.name, self.partner_name) if self.partner else (self.name,)


@dataclass(frozen=True)
class Columns:
    """The names of columns; None for those that are known by their usual names (sequence, seq, label, target ...).

    Of pairs, two for each of id and sequence.
    """

    id: str | tuple[str, str] | None = None
    sequence: str | tuple[str, str] | None = None
    label: tuple[str, ...] | None = None
    split: str | None = None


def read_examples(
    source, columns: Columns = Columns(), *, labels=None, pairs: bool = False, unlabelled: bool = False
) -> list[Example]:
    """Reads labelled proteins.

    Args:
        source: a table (`sequences.table`: comma, tab or semicolon, plain or compressed), a Parquet file, JSON
            lines, or a FASTA file, whose headers may hold `label=... split=...`; a pandas DataFrame; or an iterable of
            dictionaries.
        columns: of the table. A column of splits is used as it is; without one every split is "".
        labels: for a FASTA file, what holds its labels: a table with a column of ids; or a FASTA file of as many
            letters a protein as it has residues.
        pairs: a row has two proteins: two columns of sequences, such as sequence_a and sequence_b; or two of ids of a
            FASTA file, in the table `labels`.
        unlabelled: no labels are looked for.

    Raises ExamplesError naming file, line and column.
    """
    path = Path(source) if isinstance(source, str | Path) else None
    where = str(path) if path else "row"
    try:
        names, rows = _read(source, path)
        if labels is not None and pairs:
            (names, rows), where = _partnered(rows, Path(labels), columns, where), str(labels)
            columns = replace(columns, sequence=_BOTH)
        elif labels is not None:
            names, rows = _joined(rows, Path(labels), columns, where)
        found = _found(names, columns, where, pairs=pairs, unlabelled=unlabelled)
        examples = [_example(where, line, values, found) for line, values in rows]
        if path is not None:
            _refuse_missing(examples, found["sequence"])
    except (TableError, FastaError, DamagedStreamError) as error:
        raise ExamplesError(str(error) if where in str(error) else f"{where}: {error}") from None
    if not examples:
        raise ExamplesError(f"{where} has no rows")
    return examples


def _read(source, path: Path | None) -> tuple[list[str] | None, Iterator[tuple[int, dict]]]:
    """(names of the columns, if they are known in advance; line and values of each row)."""
    if path is None:
        rows = source
        if hasattr(source, "to_dict") and hasattr(source, "columns"):
            _distinct([str(name) for name in source.columns], "the DataFrame")
            rows = source.to_dict("records")
        rows = [{str(name): _text(value) for name, value in row.items()} for row in rows]
        return list(dict.fromkeys(name for row in rows for name in row)), enumerate(rows, start=1)
    with _naming(path), path.open("rb") as file:
        if file.read(4) == b"PAR1":
            return _parquet(path)
        file.seek(0)
        start = next(iter(decompress(file, 1 << 16)), b"").lstrip()
    if start.startswith(b">"):
        rows = list(_fasta(path))
        return list(dict.fromkeys(name for _, row in rows for name in row)), iter(rows)
    if start.startswith(b"{"):
        rows = list(_json_lines(path))
        return list(dict.fromkeys(name for _, row in rows for name in row)), iter(rows)
    table = read_table(path)
    names = _distinct([name.strip() for name in table.columns], f"{path}: line 1")
    given = ((row.line, dict(zip(names, row.values.values(), strict=True))) for row in table.rows)
    return names, given


def _distinct(names: list[str], where: str) -> list[str]:
    """Raises ExamplesError for a name that stands twice: one of the two columns would be read, and the other not."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ExamplesError(f"{where} names the column {twice!r} twice; rename one of the two")
    return names


@contextmanager
def _naming(path: Path):
    try:
        yield
    except DamagedStreamError as error:
        raise ExamplesError(f"{path}: {error}") from None


def _text(value) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):  # as some programs write text into Parquet
        return value.decode("utf-8", "replace")
    if isinstance(value, Sequence | np.ndarray):
        parts = [str(part) if part is not None else "nan" for part in value]
        return ("" if all(len(part) == 1 and part.isalpha() for part in parts) else " ").join(parts)
    return str(value)


def _parquet(path: Path) -> tuple[list[str], Iterator[tuple[int, dict]]]:
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install 'esm_fast[dataset]'; CSV does not") from None
    try:
        # Not parquet.read_table: of a folder named label=3 it makes a column.
        table = parquet.ParquetFile(path, page_checksum_verification=True).read()
    except (ArrowException, OSError) as error:
        raise ExamplesError(f"{path} cannot be read as Parquet: {error}") from None
    names = [name for name in table.column_names if name != "__index_level_0__"]
    _distinct(names, str(path))
    columns = [table.column(name).to_pylist() for name in names]
    rows = (dict(zip(names, map(_text, values), strict=True)) for values in zip(*columns, strict=True))
    return names, enumerate(rows, start=1)


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """A JSON object a line, as `datasets` and pandas (`to_json(orient="records", lines=True)`) write them."""
    with _naming(path), path.open("rb") as file:
        for number, line in enumerate(io.BufferedReader(Decompressed(file)), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=partial(_object, f"{path}: line {number}"))
            except ExamplesError:
                raise
            except (ValueError, RecursionError) as error:
                raise ExamplesError(f"{path}: line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ExamplesError(f"{path}: line {number} is no JSON object with names and values")
            yield number, {str(name): _text(value) for name, value in row.items()}


def _object(where: str, pairs: list[tuple]) -> dict:
    _distinct([name for name, _ in pairs], where)
    return dict(pairs)


def _fasta(path: Path) -> Iterator[tuple[int, dict]]:
    """Each record's id, sequence, and what its header says as name=value.

    Not by Ingest: records are rows here, as a table's are; one protein may have several, and those of a file of labels
    are no proteins. `tokens_of` applies the policy, to the rows of every format alike.
    """
    for records in read_fasta(path):
        for line, (header, sequence) in zip(records.lines.tolist(), records, strict=True):
            said = {name.lower(): value for name, value in _PAIR.findall(header)}
            yield line, {**said, "id": identifier(header), "sequence": sequence}


def _joined(rows, path: Path, columns: Columns, where: str) -> tuple[list[str], Iterator[tuple[int, dict]]]:
    """The rows of a FASTA file with the values of another file for their ids."""
    names, others = _read(path, path)
    if others is not None and names and {"sequence", "id"} == set(names):  # FASTA: its sequences are the labels
        key, names = "id", ["id", "label"]
        others = ((line, {"id": row["id"], "label": row["sequence"]}) for line, row in others)
    else:
        key = _column(names, "id", columns.id, str(path), required=True)
    values = {}
    for line, row in others:
        if (name := row.pop(key).strip()) in values:
            raise ExamplesError(f"{path}: line {line}: the id {name!r} was there before")
        values[name] = row
    names = [name for name in names if name != key]
    rows = list(rows)
    if lacking := [row["id"] for _, row in rows if row["id"] not in values]:
        shown = ", ".join(lacking[:3])
        raise ExamplesError(f"{path} has no labels for {len(lacking):,} proteins of {where}, such as {shown}")
    joined = ((line, {**values[row["id"]], "id": row["id"], "sequence": row["sequence"]}) for line, row in rows)
    return [*names, "id", "sequence"], joined


_BOTH = ("sequence of the first protein", "sequence of the second protein")  # where ids stood for them


def _partnered(rows, path: Path, columns: Columns, where: str) -> tuple[list[str], Iterator[tuple[int, dict]]]:
    """The rows of a table of pairs, with the sequences that a FASTA file has for its two ids."""
    sequences = {}
    for line, row in rows:
        if sequences.setdefault(row["id"], row["sequence"]) != row["sequence"]:
            raise ExamplesError(f"{where}: line {line}: the id {row['id']!r} was there before, with another sequence")
    names, others = _read(path, path)
    keys = _two(names, "id", columns.id, str(path), required=True)

    def joined(line: int, row: dict) -> tuple[int, dict]:
        ids = [row[key].strip() for key in keys]
        for key, name in zip(keys, ids, strict=True):
            if name not in sequences:
                raise ExamplesError(f"{path}: line {line}: {key} is {name!r}, and {where} has no such protein")
        return line, row | {both: sequences[name] for both, name in zip(_BOTH, ids, strict=True)}

    return [*names, *_BOTH], (joined(line, row) for line, row in others)


def _found(names: list[str], columns: Columns, where: str, *, pairs: bool, unlabelled: bool) -> dict[str, tuple]:
    """What each column of `Columns` is called here; () for one that is not there."""
    proteins = _two if pairs else _one
    found = {
        "id": proteins(names, "id", columns.id, where),
        "sequence": proteins(names, "sequence", columns.sequence, where, required=True),
        "split": _one(names, "split", columns.split, where),
        "label": (),
    }
    if not unlabelled:
        wanted = columns.label or _one(names, "label", None, where, required=True)
        found["label"] = tuple(_column(names, "label", name, where, required=True) for name in wanted)
    return found


def _one(names: list[str], what: str, wanted, where: str, *, required: bool = False) -> tuple[str, ...]:
    if wanted is not None and not isinstance(wanted, str):
        raise ExamplesError(f"{where}: {len(wanted)} columns {what!r} are for pairs; give one, or say that these are")
    try:
        found = _column(names, what, wanted, where, required=required)
    except ExamplesError as error:
        paired = required and wanted is None and _two(names, what, None, where)
        hint = f"; for two proteins a row, as {' and '.join(paired)}, give --pairs" if paired else ""
        raise ExamplesError(f"{error}{hint}") from None
    return () if found is None else (found,)


_SIDES = (("_a", "_b"), ("_1", "_2"), ("1", "2"), (" a", " b"), (" 1", " 2"))


def _two(names: list[str], what: str, wanted, where: str, *, required: bool = False) -> tuple[str, ...]:
    """The two columns of a pair, ids or sequences; () where none is known."""
    if wanted is not None:
        if isinstance(wanted, str) or len(wanted) != 2 or len(set(wanted)) != 2:
            raise ExamplesError(f"{where}: a pair has two columns {what!r}; name both")
        return tuple(_column(names, what, name, where) for name in wanted)
    lower = {name.lower(): name for name in reversed(names)}
    for usual in _COLUMNS[what]:
        for sides in _SIDES:
            if all(usual + side in lower for side in sides):
                return tuple(lower[usual + side] for side in sides)
    if required:
        wanted = " and ".join(_COLUMNS[what][0] + side for side in _SIDES[0])
        raise ExamplesError(
            f"{where}: line 1: there are no two columns such as {wanted} among {names}; name them with --{what}-column"
        )
    return ()


def _column(names: list[str], what: str, wanted: str | None, where: str, *, required: bool = False) -> str | None:
    if wanted is not None:
        if wanted not in names:
            raise ExamplesError(f"{where}: line 1: there is no column {wanted!r} among {names}")
        return wanted
    for usual in _COLUMNS[what]:
        if match := [name for name in names if name.lower() == usual]:
            if len(match) > 1:
                raise ExamplesError(f"{where}: line 1: {match[0]!r} or {match[1]!r}? Name one with --{what}-column")
            return match[0]
    if required:
        raise ExamplesError(f"{where}: line 1: there is no column {what!r} among {names}; name it with --{what}-column")
    return None


def _example(where: str, line: int, row: Mapping[str, str], columns: dict) -> Example:
    place = f"{where}: line {line}" if where != "row" else f"row {line}"
    row = {name: value.strip() for name, value in row.items()}
    sequences = ["".join(row.get(column, "").upper().split()).removesuffix("*") for column in columns["sequence"]]
    if not all(sequences):
        raise ExamplesError(f"{place}: {columns['sequence'][sequences.index('')]} is empty")
    labels = {name: row.get(name, "") for name in columns["label"]}
    labels = {name: "" if value.lower() in MISSING else value for name, value in labels.items()}
    split = "".join(row.get(column, "") for column in columns["split"]).lower()
    split = _SPLIT_NAMES.get(split, split)
    if split and split not in SPLITS:
        raise ExamplesError(f"{place}: {columns['split'][0]} is {split!r}; choose from {', '.join(SPLITS)}")
    sides = ("",) if len(sequences) == 1 else (" a", " b")
    ids = columns["id"] or ("",) * len(sides)
    names = [row.get(column, "") or f"line {line}{side}" for column, side in zip(ids, sides, strict=True)]
    partner = {"partner": sequences[1], "partner_name": names[1]} if len(sequences) > 1 else {}
    return Example(names[0], sequences[0], labels, split, place, line, **partner)


def _refuse_missing(examples: Sequence[Example], columns: Sequence[str]) -> None:
    """A cell NA or None is a missing value, or two or four residues: of proteins the first, whoever wrote the table."""
    found = [(text, at, example) for example in examples for at, text in enumerate(example.proteins)]
    word, at, example = next((one for one in found if one[0].lower() in MISSING), ("", 0, None))
    if example is not None and np.median([len(text) for text, *_ in found]) > 2 * max(map(len, MISSING)):
        raise ExamplesError(
            f"{example.place}: {columns[at]} is {word!r}, as programs write that there is none; leave it out"
        )


def labelled(examples: Sequence[Example], missing: str) -> list[Example]:
    """Those with a label. missing: "skip" those that have none, or "error". Raises ExamplesError."""
    found = [example for example in examples if any(example.labels.values())]
    if missing == "error" and len(found) < len(examples):
        bad = next(example for example in examples if not any(example.labels.values()))
        raise ExamplesError(
            f"{bad.place}: {' and '.join(bad.labels)} is missing (empty, NaN or the like), as in "
            f"{len(examples) - len(found):,} rows in all; use --missing skip to leave such rows out"
        )
    return found


def tokens_of(examples: Sequence[Example], policy: Policy, report: Report) -> tuple[list[Example], Tokens]:
    """The examples that the policy keeps, and their tokens. Raises ExamplesError naming file, line and column."""
    texts = [example.sequence.encode("latin-1", "replace") for example in examples]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    residues = np.frombuffer(b"".join(texts), dtype=np.uint8)
    headers = [example.name for example in examples]
    lines = np.zeros(len(examples), dtype=np.int64)
    try:
        tokens = tokenize(
            Records(headers, lines, residues, offsets), replace(policy, gaps=policy.gaps or "error"), report
        )
    except FastaError as error:
        raise ExamplesError(_placed(examples, str(error))) from None
    return [examples[number] for number in tokens.numbers.tolist()], tokens


def _placed(examples: Sequence[Example], message: str) -> str:
    """A message about record N of some sequences, with the place that N has in its file."""
    found = re.match(r"sequences: record (\d+) \(.*?\)(.*)", message, re.DOTALL)
    if found is None:
        return message
    return examples[int(found[1]) - 1].place + found[2]
