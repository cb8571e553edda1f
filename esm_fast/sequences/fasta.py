"""FASTA, or sequences in memory, to `Records`."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from esm_fast import _C

from .compression import DamagedStreamError, decompress, named
from .names import identifier

CHUNK_BYTES = 1 << 20
# The longest known protein has 45,212 residues. A record far beyond is no protein, and might fill the memory.
MAX_RECORD = 10_000_000


class FastaError(ValueError):
    """Input that cannot be used as it is; the message says where, and what to do."""


@dataclass(frozen=True)
class Records:
    """Some consecutive records of a source; residues are upper-case bytes without white space."""

    # The text after each '>', stripped; an empty one becomes 'seqnum' + the header's line index, 9 digits.
    headers: list[str]
    lines: np.ndarray  # int64 (n,): line of each header, from 1; 0 where there is none
    residues: np.ndarray  # uint8 (sum of lengths,)
    offsets: np.ndarray  # int64 (n + 1,): record i is residues[offsets[i] : offsets[i + 1]]
    first: int = 0  # number of the first record in the source, from 0
    source: str = "sequences"

    def __len__(self) -> int:
        return len(self.headers)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        text = self.residues.tobytes().decode("latin-1")  # a byte is a character, whatever it is
        bounds = self.offsets.tolist()
        return zip(self.headers, map(text.__getitem__, map(slice, bounds, bounds[1:])), strict=False)

    def where(self, i: int) -> str:
        """The place of a record, for messages."""
        line = f"line {self.lines[i]}, " if self.lines[i] else ""
        return f"{self.source}: record {self.first + i + 1} ({line}{identifier(self.headers[i])!r})"


# ---- FASTA


def read_fasta(
    source: str | os.PathLike | BinaryIO, *, chunk_bytes: int = CHUNK_BYTES, max_record: int = MAX_RECORD
) -> Iterator[Records]:
    """Yields the records of a FASTA path, "-" (standard input) or binary file object, about `chunk_bytes` at a time.

    Plain, gz, bz2, xz and zst are told apart by their first bytes; several members or frames are read as one. Lines end
    in LF, CR LF or CR, a UTF-8 byte-order mark is skipped, residues are upper-cased, white space in them is dropped.
    Headers that are not UTF-8 get U+FFFD for each bad part. Memory stays within a few chunks and the longest record,
    which may have max_record bytes, header and residues together.

    Raises FastaError, after yielding the complete records before it, where a compressed stream is cut or corrupt (but a
    file cut just between two members is whole to any reader), where text stands before the first '>', where a record is
    too large, and where there is no record; OSError where the source cannot be read.
    """
    with _open(source) as (name, stream), named(name):
        first, last = 0, "no record is complete"
        try:
            for headers, lines, residues, offsets in _parse(stream, name, chunk_bytes, max_record):
                labels = [h.strip() or f"seqnum{line - 1:09d}" for h, line in zip(headers, lines, strict=True)]
                yield Records(labels, lines, residues, offsets, first, name)
                first += len(labels)
                last = f"the last complete record is {first} (line {lines[-1]}, {identifier(labels[-1])!r})"
        except DamagedStreamError as error:
            raise FastaError(f"{name}: {error}; {last}") from error.__cause__
        if not first:
            raise FastaError(f"{name}: no FASTA record in it: the input is empty")


def parse_definition(data: bytes) -> list[tuple[str, str]]:
    """The (header, residues) of plain FASTA, as `read_fasta` must give them; the tests compare the two."""
    records = []
    for index, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines()):
        if line.startswith(b">"):
            records.append([line[1:].strip().decode("utf-8", "replace").strip() or f"seqnum{index:09d}", b""])
        elif records:
            records[-1][1] += b"".join(line.split()).upper()
        elif line.split():
            raise FastaError(f"line {index + 1}: text before the first '>'")
    if not records:
        raise FastaError("no FASTA record")
    return [(header, residues.decode("latin-1")) for header, residues in records]


@contextmanager
def _open(source) -> Iterator[tuple[str, BinaryIO]]:
    """The name and the open binary file of a source; only a file opened here is closed."""
    if isinstance(source, str) and source == "-":
        yield "<stdin>", standard_input()
    elif hasattr(source, "read"):
        yield str(getattr(source, "name", "<stream>")), source
    else:
        with open(source, "rb", buffering=0) as stream:
            yield os.fsdecode(source), stream


def require_standard_input() -> None:
    """Raises FastaError where it was closed, as services start their processes."""
    if sys.stdin is None:
        raise FastaError("standard input is closed; give a file")


def standard_input() -> BinaryIO:
    """Its bytes. Raises FastaError where it was closed."""
    require_standard_input()
    return getattr(sys.stdin, "buffer", sys.stdin)


def _parse(stream: BinaryIO, name: str, chunk_bytes: int, max_record: int) -> Iterator[tuple]:
    """Runs the C++ parser; on damage, what was complete before it comes first."""
    parser = _C.FastaParser(max_record)
    try:
        for chunk in decompress(stream, chunk_bytes):
            parser.feed(chunk)
            _check(parser, name, max_record)
            if parser.ready > chunk_bytes // 2:  # a read gives that much, a small slice of a compressed one does not
                yield parser.take()
        parser.finish()
        _check(parser, name, max_record)
    except DamagedStreamError:
        if parser.ready:
            yield parser.take()
        raise
    if parser.ready:
        yield parser.take()


def _check(parser, name: str, max_record: int) -> None:
    if parser.stray:
        line, text = parser.stray
        raise FastaError(
            f"{name}: line {line}: {text!r} stands before the first '>'{_known_format(text)}; "
            "give FASTA (plain, gz, bz2, xz or zst), with a '>' header line before each sequence"
        )
    if parser.large:
        line, header = parser.large
        raise FastaError(
            f"{name}: line {line}: the record {header.decode('utf-8', 'replace').strip()!r} has more than "
            f"{max_record:,} bytes, which no protein has; use max_record=N to read such records"
        )


# How files begin that are given in the place of FASTA.
_FORMATS = {
    b"CLUSTAL": "a Clustal alignment",
    b"MUSCLE": "a Clustal alignment",
    b"# STOCKHOLM": "a Stockholm alignment",
    b"#NEXUS": "a NEXUS file",
    b"!!AA_MULTIPLE": "an MSF alignment",
    b"PileUp": "an MSF alignment",
    b"#A3M": "an A3M alignment",
    b"LOCUS ": "a GenBank file",
    b"ID   ": "a UniProt or EMBL flat file",
    b"HEADER ": "a PDB file",
    b"ATOM  ": "a PDB file",
    b"data_": "an mmCIF file",
    b"@": "FASTQ or SAM",
    b"<": "HTML or XML",
    b"{": "JSON",
    b"PK\x03\x04": "a zip archive, which has to be unpacked",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16, which has to be saved as UTF-8",
    b"\xfe\xff": "UTF-16, which has to be saved as UTF-8",
}


def _known_format(text: bytes) -> str:
    return next((f": this looks like {what}" for start, what in _FORMATS.items() if text.startswith(start)), "")


# ---- sequences in memory


def records_from(sequences: Iterable[str | tuple[str, str]]) -> Iterator[Records]:
    """Yields Records of strings, or of (label, string) pairs; a string alone is labelled with its index.

    Letters are upper-cased as those of a FASTA are, ASCII only, and each other character stays one unknown residue.
    """
    if isinstance(sequences, (str, bytes)):
        raise TypeError("a single string is not a list of sequences: give [string], or read_fasta(path) for a file")
    labels, texts, size, first = [], [], 0, 0
    for index, item in enumerate(sequences):
        label, text = (index, item) if isinstance(item, str) else _pair(index, item)
        labels.append(str(label))
        texts.append(b"".join(text.encode("latin-1", "replace").upper().split()))
        size += len(texts[-1]) + 1  # so that an endless stream of empty strings is passed on too
        if size >= CHUNK_BYTES:
            yield _join(labels, texts, first)
            labels, texts, size, first = [], [], 0, index + 1
    if labels:
        yield _join(labels, texts, first)


def _pair(index: int, item) -> tuple[str, str]:
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[1], str):
        return tuple(item)
    raise TypeError(f"sequence {index} is {item!r:.80}: give strings, or (label, string) pairs")


def _join(labels: list[str], texts: list[bytes], first: int) -> Records:
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    residues = np.frombuffer(b"".join(texts), dtype=np.uint8)
    return Records(labels, np.zeros(len(labels), np.int64), residues, offsets, first)
