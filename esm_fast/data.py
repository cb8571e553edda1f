"""FASTA to `Records`, and `Records` to `Tokens` under a `Policy`; nothing is lost without being counted."""

import bz2
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import BinaryIO

import numpy as np

from esm_fast import _C

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
        except _DamagedStreamError as error:
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


class _DamagedStreamError(Exception):
    """A compressed stream that is cut or corrupt."""


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
        for chunk in _decompress(stream, chunk_bytes):
            parser.feed(chunk)
            _check_stray(parser, name)
            if parser.ready > chunk_bytes // 2:  # a read gives that much, a small slice of a compressed one does not
                yield parser.take()
        parser.finish()
        _check_stray(parser, name)
    except _DamagedStreamError:
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


# ---- compression


def _zst_decoder():
    import zstandard  # here, so that nothing else waits for it

    # Frames made with `zstd --long=31` need a window this large; the default refuses them.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


# The first bytes (for zst also those of a skippable frame, with which pzstd begins), and what makes a decoder.
_FORMATS: dict[str, tuple[tuple[bytes, ...], Callable]] = {
    "gz": ((b"\x1f\x8b",), lambda: zlib.decompressobj(wbits=31)),
    "bz2": ((b"BZh",), bz2.BZ2Decompressor),
    "xz": ((b"\xfd7zXZ\0",), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
    "zst": ((b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))), _zst_decoder),
}
_MAGIC_BYTES = 6  # the longest
# zstandard cannot limit what it returns, so it gets little at a time; the others copy what is left when a member ends.
_SLICE_BYTES = {"gz": 1 << 16, "bz2": 1 << 16, "xz": 1 << 16, "zst": 1 << 12}


def _decompress(stream: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    """The plain bytes of a stream, in pieces."""
    pieces = _pieces(stream, chunk_bytes)
    head = b""
    while len(head) < _MAGIC_BYTES and (piece := next(pieces, b"")):
        head += piece
    pieces = chain([head], pieces)
    for kind, (magic, decoder) in _FORMATS.items():
        if head.startswith(magic):
            return _members(pieces, kind, decoder, chunk_bytes)
    return pieces


def _pieces(stream: BinaryIO, size: int) -> Iterator[bytes]:
    while piece := stream.read(size):
        if isinstance(piece, str):
            raise TypeError("the FASTA file object is open as text: open it in binary mode, 'rb'")
        yield bytes(piece)


def _members(pieces: Iterator[bytes], kind: str, new_decoder: Callable, limit: int) -> Iterator[bytes]:
    """The plain bytes of all members (gz), streams (bz2, xz) or frames (zst), each checked to its end."""
    step, decoder = _SLICE_BYTES[kind], None
    for data in (piece[at : at + step] for piece in pieces for at in range(0, len(piece), step)):
        more = False  # output held back by the limit
        while data or more:
            if decoder is None:
                data = data.lstrip(b"\0")  # members may be padded with zeros, as gzip allows
                if not data:
                    break
                decoder = new_decoder()
            try:
                plain = decoder.decompress(data) if kind == "zst" else decoder.decompress(data, limit)
            except Exception as error:  # each library has an exception of its own
                raise _DamagedStreamError(f"the {kind} stream is corrupt ({error})") from error
            if plain:
                yield plain
            if decoder.eof:
                data, decoder, more = decoder.unused_data, None, False
            else:
                data, more = getattr(decoder, "unconsumed_tail", b""), len(plain) == limit
    if decoder is not None:
        raise _DamagedStreamError(f"the {kind} stream is cut short")


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


# ---- tokens


@dataclass(frozen=True)
class Policy:
    """What to do with residues ESM-1b does not know, with records that have none, and with those that have too many."""

    unknown: str = "error"  # or "x": read each as X; or "skip" the record
    empty: str = "error"  # or "skip" the record
    overlength: str = "error"  # or "truncate" to the first max_residues; or "window": left whole, for the engine to cut
    max_residues: int = 1022  # what ESM-1b's position table has room for, beside cls and eos

    def __post_init__(self):
        choices = {
            "unknown": ("error", "x", "skip"),
            "empty": ("error", "skip"),
            "overlength": ("error", "truncate", "window"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose from {', '.join(map(repr, allowed))}")
        if self.max_residues < 1:
            raise ValueError(f"max_residues is {self.max_residues}: give 1 or more")


@dataclass
class Report:
    """Counts of what `tokenize` did: every record is kept or skipped."""

    records: int = 0  # all, the skipped ones included
    residues: int = 0  # kept
    unknown: int = 0  # residues read as X
    skipped_unknown: int = 0  # records skipped for an unknown residue
    empty: int = 0  # records skipped for having no residue
    stops_stripped: int = 0  # records that lost a final '*'
    truncated: int = 0
    windowed: int = 0
    skipped: list[tuple[int, str, str]] = field(default_factory=list)  # (number from 0, id, reason), the first 1,000

    @property
    def kept(self) -> int:
        return self.records - self.skipped_unknown - self.empty


SKIPPED_LISTED = 1000


@dataclass(frozen=True)
class Tokens:
    """Records as token ids, without cls and eos."""

    headers: list[str]
    numbers: np.ndarray  # int64 (n,): number of each record in its source, from 0; skipped records leave gaps
    ids: np.ndarray  # uint8 (sum of lengths,)
    offsets: np.ndarray  # int64 (n + 1,): record i is ids[offsets[i] : offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.headers)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def tokenize(records: Records, policy: Policy, report: Report) -> Tokens:
    """Token ids of the records under the policy, counted in the report.

    A final '*' is dropped, and a literal <mask> (any special token but <pad>) is that token. Raises FastaError, naming
    record, line and column, at the first record the policy does not allow; the report is then as it was.
    """
    ids, offsets, unknown, column, stops = _C.encode_records(records.residues, records.offsets)
    lengths = np.diff(offsets)
    has_unknown, is_empty = unknown > 0, lengths == 0
    skip_unknown = has_unknown & (policy.unknown == "skip")
    skip_empty = is_empty & (policy.empty == "skip")
    kept = ~(skip_unknown | skip_empty)
    is_long = (lengths > policy.max_residues) & kept

    checks = (
        (policy.empty, is_empty, lambda i: ": it has no residues; use empty='skip' to leave such records out"),
        (policy.unknown, has_unknown, lambda i: _unknown_message(records, i, int(column[i]))),
        (policy.overlength, is_long, lambda i: _overlength_message(int(lengths[i]), policy)),
    )
    refused = [(int(hit.argmax()), why) for action, hit, why in checks if action == "error" and hit.any()]
    if refused:
        i, why = min(refused, key=lambda first: first[0])
        line = f"line {records.lines[i]}, " if records.lines[i] else ""
        where = f"{records.source}: record {records.first + i + 1} ({line}{identifier(records.headers[i])!r})"
        raise FastaError(where + why(i))

    report.records += len(records)
    report.unknown += int(unknown[kept].sum())
    report.skipped_unknown += int(skip_unknown.sum())
    report.empty += int(skip_empty.sum())
    report.stops_stripped += int((stops & kept).sum())
    for i in np.flatnonzero(~kept)[: SKIPPED_LISTED - len(report.skipped)].tolist():
        reason = "empty" if is_empty[i] else "unknown residue"
        report.skipped.append((records.first + i, identifier(records.headers[i]), reason))

    headers, numbers = records.headers, records.first + np.arange(len(records), dtype=np.int64)
    if policy.overlength == "truncate":
        report.truncated += int(is_long.sum())
        lengths = np.minimum(lengths, policy.max_residues)
    elif policy.overlength == "window":
        report.windowed += int(is_long.sum())
    if not kept.all() or (policy.overlength == "truncate" and is_long.any()):
        index = np.flatnonzero(kept)
        headers, numbers, lengths = [headers[i] for i in index], numbers[kept], lengths[kept]
        spans = zip(offsets[index].tolist(), lengths.tolist(), strict=True)
        ids = np.concatenate([ids[:0], *(ids[start : start + length] for start, length in spans)])
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    report.residues += int(offsets[-1])
    return Tokens(headers, numbers, ids, offsets)


def _unknown_message(records: Records, i: int, column: int) -> str:
    byte = int(records.residues[records.offsets[i] + column])
    return (
        f", column {column + 1}: {chr(byte)!r} (0x{byte:02x}) is not a residue ESM-1b knows; "
        "use unknown='x' to read such residues as X, or unknown='skip' to leave such records out"
    )


def _overlength_message(length: int, policy: Policy) -> str:
    return (
        f": it has {length} residues and the limit is {policy.max_residues}; use overlength='window' for overlapping "
        "windows, averaged per residue, or overlength='truncate' for its first part"
    )


# ---- headers


def identifier(header: str) -> str:
    """The first word of a header."""
    return (header.split(None, 1) or [header])[0]


def accession(header: str) -> str:
    """The accession of a UniProt header: P12345 of "sp|P12345|NAME_HUMAN ..." or "tr|..."; else the identifier."""
    word = identifier(header)
    parts = word.split("|")
    return parts[1] if len(parts) >= 3 and parts[0] in ("sp", "tr") and parts[1] else word
