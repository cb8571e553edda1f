"""`Records` to `Tokens` under a `Policy`; nothing is lost without being counted."""

from dataclasses import dataclass, field

import numpy as np

from esm_fast import _C

from .fasta import FastaError, Records
from .names import identifier


@dataclass(frozen=True)
class Policy:
    """What to do with residues ESM-1b does not know, with records that have none, and with those that have too many."""

    unknown: str = "error"  # or "x": read each as X; or "skip" the record
    empty: str = "error"  # or "skip" the record
    overlength: str = "error"  # or "truncate" to the first max_residues; or "window": left whole, to be cut later
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
