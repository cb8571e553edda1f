"""FASTA files under a policy: each record is kept under a name of its own, or skipped with the reason, and counted."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .fasta import MAX_RECORD, FastaError, Records, read_fasta, require_standard_input
from .names import Ids, accession
from .tokenize import Policy, Report, Tokens, tokenize

DUPLICATE = "duplicate"  # a reason, beside those of tokenize


@dataclass
class Counts:
    """Of one reading: records = proteins + every kind of skipped."""

    report: Report = field(default_factory=Report)
    proteins: int = 0  # to compute, or computed
    residues: int = 0  # of these
    squares: int = 0  # of their lengths, summed: the cells of all contact maps
    renamed: int = 0  # duplicates that were kept
    dropped: int = 0  # duplicates that were not
    done: int = 0  # left out because their result is there already

    @property
    def skipped(self) -> dict[str, int]:
        report = self.report
        return {"unknown residue": report.skipped_unknown, "empty": report.empty, DUPLICATE: self.dropped}

    @property
    def changed(self) -> dict[str, int]:
        report = self.report
        gaps = {"gaps removed": report.gaps_removed} if report.gaps_removed else {}
        return {
            "unknown residues read as X": report.unknown,
            "final * stripped": report.stops_stripped,
            "truncated": report.truncated,
            "windowed": report.windowed,
            "duplicates renamed": self.renamed,
        } | gaps

    def count(self, lengths: np.ndarray) -> None:
        self.proteins += len(lengths)
        self.residues += int(lengths.sum())
        self.squares += int((lengths**2).sum())


class Skipped(NamedTuple):
    """A record that was left out."""

    record: int  # its number in all sources together, from 0
    source: int  # number of its source, from 0
    line: int  # of its header, from 1
    id: str
    reason: str
    detail: str


class Batch(NamedTuple):
    """Some consecutive records."""

    tokens: Tokens  # of those that are kept
    ids: list[str]  # theirs, each given once
    first: int  # number of the source's first record in all sources together
    skipped: list[Skipped]
    source: str = ""  # the name of what they were read from


@dataclass(frozen=True)
class Ingest:
    """How records are read.

    Attributes:
        id_of: what makes a header an id. safe: what makes an id a name that can be given, see `names`.
        duplicates: of ids: "keep" the second P12345 as P12345_2, "skip" it, or "error"; "ignore": ids may be equal.
        done: whether the result of a name is there already, so that the record is left out.
        unstorable: says what the output cannot hold of a header, or None; such a record is an error.
        max_record: the most bytes of a record.
    """

    policy: Policy
    id_of: Callable[[str], str] = accession
    safe: Callable[[str], str] = str
    duplicates: str = "keep"
    done: Callable[[str], bool] = lambda name: False
    unstorable: Callable[[str], str | None] = lambda header: None
    max_record: int = MAX_RECORD

    def read(self, sources: Iterable, counts: Counts) -> Iterator[Batch]:
        """What `read_fasta` takes, one after the other, counted as it is read. Raises FastaError."""
        ids = Ids()
        for number, source in enumerate(sources):
            first = counts.report.records
            for records in read_fasta(source, max_record=self.max_record):
                yield self._batch(records, ids, counts, number, first)

    def _batch(self, records: Records, names: Ids, counts: Counts, source: int, first: int) -> Batch:
        for i, header in enumerate(records.headers):
            if what := self.unstorable(header):
                raise FastaError(f"{records.where(i)}: its header holds {what}; remove it from the header")
        tokens = tokenize(records, self.policy, counts.report)
        left_out = [
            (skip.place, self.id_of(records.headers[skip.place]), skip.reason, skip.detail) for skip in tokens.skipped
        ]
        wanted = [self.safe(self.id_of(header)) for header in tokens.headers]
        given = wanted if self.duplicates == "ignore" else names.give(wanted, rename=self.duplicates == "keep")
        keep = np.ones(len(tokens), dtype=bool)
        for i, name in enumerate(given):
            if name is None:
                keep[i] = False
                left_out.append(self._duplicate(records, int(tokens.numbers[i]) - records.first, counts))
            elif self.done(name):
                keep[i] = False
                counts.done += 1
        counts.renamed += sum(name is not None and name != old for name, old in zip(given, wanted, strict=True))
        tokens = tokens.where(keep)
        counts.count(tokens.lengths)
        skipped = [
            Skipped(first + records.first + i, source, int(records.lines[i]), *why) for i, *why in sorted(left_out)
        ]
        ids = [name for name, kept in zip(given, keep.tolist(), strict=True) if kept]
        return Batch(tokens, ids, first, skipped, records.source)

    def _duplicate(self, records: Records, i: int, counts: Counts) -> tuple[int, str, str, str]:
        name = self.id_of(records.headers[i])
        if self.duplicates == "error":
            where = f"{records.source}: record {records.first + i + 1} (line {records.lines[i]})"
            raise FastaError(
                f"{where}: the id {name!r} was there before; use duplicates='keep' to store it under another "
                "name, or duplicates='skip' to leave it out"
            )
        counts.dropped += 1
        counts.report.list_skipped(records.first + i, name, DUPLICATE)
        return i, name, DUPLICATE, ""


# ---- read twice


class Label(str):
    """A record's header, and the name it is stored under."""

    name: str


class Source:
    """FASTA paths ("-" is standard input), as often as they are needed: what cannot be read twice is kept on disk."""

    def __init__(self, paths: list[str], ingest: Ingest):
        self.paths, self.ingest = paths, ingest

    def __enter__(self):
        with ExitStack() as stack:
            self.inputs = [path if Path(path).is_file() else stack.enter_context(_Spool(path)) for path in self.paths]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def scan(self) -> Counts:
        """Reads everything once: raises what there is to raise, before anything is computed."""
        counts = Counts()
        for _ in self.tokens(counts):
            pass
        if not counts.proteins and not counts.done:
            raise FastaError(f"nothing is left to compute: all {counts.report.records} records were skipped")
        return counts

    def tokens(self, counts: Counts) -> Iterator[Tokens]:
        """The proteins, their headers as Labels. The generator counts into `counts`."""
        for source in self.inputs:
            if isinstance(source, _Spool):
                source.file.seek(0)
        for batch in self.ingest.read(self.inputs, counts):
            labels = [Label(header) for header in batch.tokens.headers]
            for label, name in zip(labels, batch.ids, strict=True):
                label.name = name
            yield replace(batch.tokens, headers=labels)


class _Spool:
    """Standard input, or a pipe, copied to a temporary file."""

    def __init__(self, path: str):
        self.name = "<stdin>" if path == "-" else path
        self.path = path

    def __enter__(self):
        self.file = tempfile.TemporaryFile()
        try:
            if self.path == "-":
                require_standard_input()
                shutil.copyfileobj(sys.stdin.buffer, self.file)
            else:
                with open(self.path, "rb") as pipe:
                    shutil.copyfileobj(pipe, self.file)
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self, size: int) -> bytes:
        return self.file.read(size)
