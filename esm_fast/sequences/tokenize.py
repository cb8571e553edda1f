"""`Records` to `Tokens` under a `Policy`; nothing is lost without being counted."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from esm_fast import _C

from .fasta import FastaError, Records
from .names import identifier

UNKNOWN, EMPTY, SPECIAL = "unknown residue", "empty", "special token"  # reasons
FIRST_LETTER, GAPS = 4, (29, 30)  # ids: of the first letter; of '.' and '-', the last ones
_GAP_BYTES = np.frombuffer(b".-", dtype=np.uint8)
_TOKEN = re.compile(rb"<\w{1,8}>\Z")
_PIR_CODES = ("P1", "F1", "DL", "DC", "RL", "RC", "N1", "N3", "XX")
_SHOWN = 40  # characters of a text in a message


@dataclass(frozen=True)
class Policy:
    """What to do with residues ESM-1b does not know, with records that have none, and with those that have too many."""

    unknown: str = "error"  # or "x": read each as X; or "skip" the record
    empty: str = "error"  # or "skip" the record
    overlength: str = "error"  # or "truncate" to the first max_residues; or "window": left whole, to be cut later
    max_residues: int = 1022  # what ESM-1b's position table has room for, beside cls and eos
    gaps: str | None = None  # '-' and '.': "error", "remove", "keep" as tokens; None: an error in files only
    specials: str = "keep"  # records that hold a literal token such as <mask>; or "skip" them

    @property
    def window(self) -> int | None:
        """The residues of a window, where long proteins are cut into windows."""
        return self.max_residues if self.overlength == "window" else None

    def __post_init__(self):
        choices = {
            "unknown": ("error", "x", "skip"),
            "empty": ("error", "skip"),
            "overlength": ("error", "truncate", "window"),
            "gaps": (None, "error", "remove", "keep"),
            "specials": ("keep", "skip"),
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
    specials: int = 0  # records skipped for a literal special token
    stops_stripped: int = 0  # records that lost a final '*'
    gaps_removed: int = 0  # '-' and '.'
    truncated: int = 0
    windowed: int = 0
    skipped: list[tuple[int, str, str]] = field(default_factory=list)  # (number from 0, id, reason), the first 1,000

    @property
    def kept(self) -> int:
        return self.records - self.skipped_unknown - self.empty - self.specials

    def list_skipped(self, number: int, name: str, reason: str) -> None:
        if len(self.skipped) < _SKIPPED_LISTED:
            self.skipped.append((number, name, reason))


_SKIPPED_LISTED = 1000


class Skipped(NamedTuple):
    """A record that a policy left out."""

    place: int  # in its Records
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Tokens:
    """Records as token ids, without cls and eos."""

    headers: list[str]
    numbers: np.ndarray  # int64 (n,): number of each record in its source, from 0; skipped records leave gaps
    ids: np.ndarray  # uint8 (sum of lengths,)
    offsets: np.ndarray  # int64 (n + 1,): record i is ids[offsets[i] : offsets[i + 1]]
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.headers)

    @property
    def lengths(self) -> np.ndarray:
        return self.offsets[1:] - self.offsets[:-1]

    def where(self, kept: np.ndarray) -> "Tokens":
        """Those of them for which `kept`, bool (n,), is true."""
        if kept.all():
            return self
        lengths = self.lengths
        headers = [header for header, keep in zip(self.headers, kept.tolist(), strict=True) if keep]
        offsets = np.concatenate([[0], np.cumsum(lengths[kept], dtype=np.int64)])
        return replace(
            self, headers=headers, numbers=self.numbers[kept], ids=self.ids[np.repeat(kept, lengths)], offsets=offsets
        )


def tokenize(records: Records, policy: Policy, report: Report) -> Tokens:
    """Token ids of the records under the policy, counted in the report.

    A final '*' is dropped, and a literal <mask> (any special token but <pad>) is that token. Raises FastaError, naming
    record, line and column, at the first record the policy does not allow, and whatever the policy where a header
    stands within residues or the records are those of a PIR file; also for control characters, comments and bytes
    beyond ASCII in a file, which are no X. The report is then as it was.
    """
    encoded = _encode(records)
    gaps_removed = 0
    if policy.gaps == "remove" and encoded.has_gaps:
        records, gaps_removed = _without_gaps(records)
        encoded = _encode(records)
    _refuse(records, policy, encoded)

    headers, numbers = records.headers, records.first + np.arange(len(records), dtype=np.int64)
    skipped = _skipped(records, policy, encoded)
    kept = np.ones(len(records), dtype=bool)
    kept[[skip.place for skip in skipped]] = False
    tokens = Tokens(headers, numbers, encoded.ids, encoded.offsets, skipped).where(kept)
    is_long = tokens.lengths > policy.max_residues
    if policy.overlength == "truncate":
        report.truncated += int(is_long.sum())
        tokens = _truncated(tokens, policy.max_residues) if is_long.any() else tokens
    elif policy.overlength == "window":
        report.windowed += int(is_long.sum())

    reasons = Counter(skip.reason for skip in skipped)
    report.records += len(records)
    report.residues += int(tokens.offsets[-1])
    report.unknown += int(encoded.unknown[kept].sum())
    report.skipped_unknown += reasons[UNKNOWN]
    report.empty += reasons[EMPTY]
    report.specials += reasons[SPECIAL]
    report.stops_stripped += int((encoded.stops & kept).sum())
    report.gaps_removed += gaps_removed
    for skip in skipped:
        report.list_skipped(records.first + skip.place, identifier(records.headers[skip.place]), skip.reason)
    return tokens


class _Encoded(NamedTuple):
    ids: np.ndarray  # as those of Tokens
    offsets: np.ndarray
    unknown: np.ndarray  # int64 (n,): unknown bytes of each record
    column: np.ndarray  # int64 (n,): of the first of them, from 0
    stops: np.ndarray  # bool (n,): a final '*' was dropped

    @property
    def lengths(self) -> np.ndarray:
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def has_gaps(self) -> bool:
        return len(self.ids) > 0 and int(self.ids.max()) >= GAPS[0] and bool(np.isin(self.ids, GAPS).any())

    @property
    def specials(self) -> np.ndarray:
        """bool (n,): whether a record holds a token that is no letter."""
        odd = (self.ids < FIRST_LETTER) | (self.ids > GAPS[-1])
        found = np.zeros(len(self.unknown), dtype=bool)
        found[np.searchsorted(self.offsets, np.flatnonzero(odd), side="right") - 1] = True
        return found


def _encode(records: Records) -> _Encoded:
    return _Encoded(*_C.encode_records(records.residues, records.offsets))


def _skipped(records: Records, policy: Policy, encoded: _Encoded) -> list[Skipped]:
    found = {}
    if policy.specials == "skip":
        found |= {i: Skipped(i, SPECIAL) for i in np.flatnonzero(encoded.specials).tolist()}
    if policy.empty == "skip":
        found |= {i: Skipped(i, EMPTY) for i in np.flatnonzero(encoded.lengths == 0).tolist()}
    if policy.unknown == "skip":
        for i in np.flatnonzero(encoded.unknown).tolist():
            at = int(encoded.column[i])
            found[i] = Skipped(i, UNKNOWN, f"{chr(records.residues[records.offsets[i] + at])!r} at {at + 1}")
    return [found[i] for i in sorted(found)]


def _truncated(tokens: Tokens, longest: int) -> Tokens:
    lengths = np.minimum(tokens.lengths, longest)
    spans = zip(tokens.offsets.tolist(), lengths.tolist(), strict=False)
    ids = np.concatenate([tokens.ids[:0], *(tokens.ids[start : start + length] for start, length in spans)])
    return replace(tokens, ids=ids, offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


def _without_gaps(records: Records) -> tuple[Records, int]:
    """The records without '-' and '.', and how many these were."""
    residue = ~np.isin(records.residues, _GAP_BYTES)
    ends = np.concatenate([[0], np.cumsum(residue, dtype=np.int64)])
    left = records.residues[records.offsets[0] :][residue[records.offsets[0] :]]
    offsets = ends[records.offsets] - ends[records.offsets[0]]
    return replace(records, residues=left, offsets=offsets), int((~residue).sum())


# ---- what is refused


def _refuse(records: Records, policy: Policy, encoded: _Encoded) -> None:
    """Raises FastaError for the first record that may not pass."""
    lengths, found = encoded.lengths, []
    is_unknown, is_empty = encoded.unknown > 0, lengths == 0
    if is_unknown.any():
        found += _headers_within(records)
    of_file = bool(len(records)) and records.lines[0] > 0
    if of_file:
        found += _pir(records)
    if policy.gaps == "error" or (policy.gaps is None and of_file):
        found += _gaps(records, encoded)
    if policy.empty == "error" and is_empty.any():
        found.append((int(is_empty.argmax()), ": it has no residues; use empty='skip' to leave such records out"))
    if policy.unknown == "error" and is_unknown.any():
        i = int(is_unknown.argmax())
        found.append((i, _unknown_message(records, i, int(encoded.column[i]))))
    if policy.unknown == "x" and of_file and is_unknown.any():
        found += _no_residues(records)
    if policy.overlength == "error":
        left_out = (policy.unknown == "skip") & is_unknown
        is_long = (lengths > policy.max_residues) & ~left_out
        if is_long.any():
            i = int(is_long.argmax())
            found.append((i, _overlength_message(int(lengths[i]), policy)))
    if found:
        i, why = min(found, key=lambda first: first[0])
        raise FastaError(f"{records.where(i)}{why}")


def _headers_within(records: Records) -> list[tuple[int, str]]:
    """The first record with a '>' among its residues: whatever follows is another protein's."""
    places = np.flatnonzero(records.residues == ord(">")).tolist()
    # <mask> and the other tokens end in one.
    places = [at for at in places if not _TOKEN.search(records.residues[max(0, at - 9) : at + 1].tobytes())]
    if not places:
        return []
    i = int(np.searchsorted(records.offsets, places[0], side="right")) - 1
    text = records.residues[places[0] : min(places[0] + _SHOWN, records.offsets[i + 1])].tobytes()
    return [
        (
            i,
            f", column {places[0] - records.offsets[i] + 1}: {text.decode('latin-1')!r} stands within the residues: a "
            "line break is missing before a header, as where files were joined of which one lacks its last; put it in",
        )
    ]


def _pir(records: Records) -> list[tuple[int, str]]:
    if ";" not in "".join(records.headers):  # ten times as quick as to look at each
        return []
    for i, header in enumerate(records.headers):
        if header[2:3] == ";" and header[:2] in _PIR_CODES:
            return [
                (
                    i,
                    ": this is the PIR (NBRF) format, in which a line of description follows, which would be read as "
                    "residues; convert it to FASTA, or give the record another id if this is FASTA",
                )
            ]
    return []


def _gaps(records: Records, encoded: _Encoded) -> list[tuple[int, str]]:
    if not encoded.has_gaps:
        return []
    at = int(np.flatnonzero(np.isin(records.residues, _GAP_BYTES))[0])
    i = int(np.searchsorted(records.offsets, at, side="right")) - 1
    return [
        (
            i,
            f", column {at - records.offsets[i] + 1}: {chr(records.residues[at])!r} is a gap, as in an alignment; use "
            "gaps='remove' for the residues without their gaps, or gaps='keep' to compute gaps as tokens of their own",
        )
    ]


# Bytes of files that stand for no residue, not even an unknown one: to read them as X would shift, or make, residues.
_NO_RESIDUE = np.array([byte < 0x20 or byte >= 0x7F or byte == ord(";") for byte in range(256)])


def _why_no_residue(byte: int) -> str:
    if not byte:
        return "a NUL, as in UTF-16 and in what a full disk or a crash leaves"
    if byte >= 0x80:
        return "part of a character beyond ASCII, such as a non-breaking space or a letter that looks like another"
    return "the sign of a comment" if byte == ord(";") else "a control character"


def _no_residues(records: Records) -> list[tuple[int, str]]:
    places = np.flatnonzero(_NO_RESIDUE[records.residues[records.offsets[0] :]])
    if not len(places):
        return []
    at = int(places[0] + records.offsets[0])
    i = int(np.searchsorted(records.offsets, at, side="right")) - 1
    return [(i, _unknown_message(records, i, at - int(records.offsets[i])))]


def _unknown_message(records: Records, i: int, column: int) -> str:
    byte = int(records.residues[records.offsets[i] + column])
    what, skip = "is not a residue ESM-1b knows", "unknown='skip' to leave such records out"
    cure = f"; use unknown='x' to read such residues as X, or {skip}"
    if records.lines[i] and _NO_RESIDUE[byte]:
        cure = f": it is {_why_no_residue(byte)}; remove it, or use {skip}"
    return f", column {column + 1}: {chr(byte)!r} (0x{byte:02x}) {what}{cure}"


def _overlength_message(length: int, policy: Policy) -> str:
    return (
        f": it has {length} residues and the limit is {policy.max_residues}; use overlength='window' for overlapping "
        "windows, averaged per residue, or overlength='truncate' for its first part"
    )
