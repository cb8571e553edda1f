"""FASTA, or sequences in memory, to `Records`."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from esm_fast import _C

from .compression import DamagedStreamError, decompress
from .names import identifier

CHUNK_BYTES = 1 << 20


class FastaError(ValueError):
    """Input that cannot be used as it is; the message says where, and what to do."""


@dataclass(frozen=True)
class Records:
    """Some consecutive records of a source; residues are upper-case bytes without white space."""

    headers: list[
        str
    ]  # the text after '>', stripped; an empty one becomes 'seqnum' + the header's line index, 9 digits
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


# ---- FASTA


def read_fasta(source: str | os.PathLike | BinaryIO, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Records]:
    """Yields the records of a FASTA path, "-" (standard input) or binary file object, about `chunk_bytes` at a time.

    Plain, gz, bz2, xz and zst are told apart by their first bytes; several members or frames are read as one. Lines end
    in LF, CR LF or CR, a UTF-8 byte-order mark is skipped, residues are upper-cased, white space in them is dropped.
    Headers that are not UTF-8 get U+FFFD for each bad part. Memory stays within a few chunks and the longest record.

    Raises FastaError, after yielding the complete records before it, where a compressed stream is cut or corrupt (but a
    file cut just between two members is whole to any reader), where text stands before the first '>', and where there
    is no record; OSError where the source cannot be read.
    """
    with _open(source) as (name, stream):
        first, last = 0, "no record is complete"
        try:
            for headers, lines, residues, offsets in _parse(stream, name, chunk_bytes):
                named = [h.strip() or f"seqnum{line - 1:09d}" for h, line in zip(headers, lines, strict=True)]
                yield Records(named, lines, residues, offsets, first, name)
                first += len(named)
                last = f"the last complete record is {first} (line {lines[-1]}, {identifier(named[-1])!r})"
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
        yield "<stdin>", getattr(sys.stdin, "buffer", sys.stdin)
    elif hasattr(source, "read"):
        yield str(getattr(source, "name", "<stream>")), source
    else:
        with open(source, "rb", buffering=0) as stream:
            yield os.fsdecode(source), stream


def _parse(stream: BinaryIO, name: str, chunk_bytes: int) -> Iterator[tuple]:
    """Runs the C++ parser; on damage, what was complete before it comes first."""
    parser = _C.FastaParser()
    try:
        for chunk in decompress(stream, chunk_bytes):
            parser.feed(chunk)
            _check_stray(parser, name)
            if parser.ready > chunk_bytes // 2:  # a read gives that much, a small slice of a compressed one does not
                yield parser.take()
        parser.finish()
        _check_stray(parser, name)
    except DamagedStreamError:
        if parser.ready:
            yield parser.take()
        raise
    if parser.ready:
        yield parser.take()


def _check_stray(parser, name: str):
    if parser.stray:
        line, text = parser.stray
        raise FastaError(
            f"{name}: line {line}: {text!r} stands before the first '>'; "
            "give FASTA (plain, gz, bz2, xz or zst), with a '>' header line before each sequence"
        )


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
