"""Making the plan of a data set: every record's id, every distinct sequence once, cut into units, before any computing.

One pass over the input, in memory of one unit and 60 to 76 bytes a record. The plan holds the sequences themselves, so
that workers need the input no more than to see that it is still the same.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import _C
from ..alphabet import Alphabet
from ..files.atomic import alone, remove_leftovers
from ..files.checked_json import write_json
from ..files.checksums import digest_of, sha256
from ..sequences.fasta import Records, read_fasta
from ..sequences.names import accession
from ..sequences.seen import Ids, Seen, keys_of
from ..sequences.tokenize import Policy, Report, Tokens, tokenize
from . import layout
from .errors import DatasetError
from .plan import Plan, load

_LETTERS = np.frombuffer("".join(t if len(t) == 1 else "<" for t in Alphabet().all_toks).encode(), dtype=np.uint8)
_READ_BYTES = 1 << 20


def make_or_resume(
    folder: Path, inputs: list, fields: dict, info: dict, policy: Policy, on_read: Callable[[], None] = lambda: None
) -> Plan:
    """The plan in the folder, if it is the one that these arguments make; else a new one.

    inputs: FASTA paths, or "-". fields: all of the fingerprint but the input. on_read: called now and then; may raise.
    Raises DatasetError for another plan, naming the fields that differ; FastaError for input that the policy does not
    allow.
    """
    folder.mkdir(exist_ok=True)
    maker = _Maker(folder, fields, info, policy)
    with alone(folder / layout.LOCK) as held:
        if not (folder / layout.PLAN).exists():
            _require_own(folder)
            remove_leftovers(folder)
            with suppress(FileExistsError):  # without locks, another process may have been first
                return maker.make(inputs, on_read, replace=held)
    plan = load(folder)
    _require_same(plan, fields)
    _require_same(plan, {"input": [_hash_of(source, on_read) for source in inputs]})
    with alone(folder / layout.LOCK):
        if not all((folder / name).exists() for name in layout.TABLES):  # a damaged one was removed
            maker.make(inputs, on_read, replace=True)
    return plan


def _require_same(plan: Plan, wanted: dict) -> None:
    differ = [name for name in wanted if plan.fields.get(name) != wanted[name]]
    if differ:
        said = "; ".join(f"{name} is {wanted[name]!r}, and was {plan.fields.get(name)!r}" for name in differ)
        raise DatasetError(f"{plan.folder} holds another data set: {said}. Give the same again, or another -o")


def _require_own(folder: Path) -> None:
    """Without a plan.json there may be what a run left that was stopped before, or what is left of a damaged one."""
    names = {path.name for path in folder.iterdir() if not path.name.endswith(".partial")}
    if strange := sorted(names - {*layout.TABLES, layout.LOCK, layout.POOLED, layout.RESIDUES, layout.RUN}):
        raise DatasetError(f"{folder} is no data set and holds other files ({strange[0]} ...); give a new folder")


def _require_own_shards(folder: Path, plan_id: str) -> None:
    """Shards without a plan.json have to be this plan's; those that cannot be read are going to be made again."""
    for path in sorted((folder / layout.POOLED).glob("part-*.parquet")):
        found = plan_id
        with suppress(DatasetError), layout.open_table(path) as file:
            found = (file.schema_arrow.metadata or {}).get(b"plan", b"").decode()
        if found != plan_id:
            raise DatasetError(f"{folder} has no {layout.PLAN} and holds the shards of another plan; give a new folder")


def _hash_of(source, on_read: Callable[[], None]) -> str:
    with _Hashed(source) as stream:
        while stream.read(_READ_BYTES):
            on_read()
        return stream.sha256


class _Hashed:
    """A binary file that knows the SHA-256 of what was read from it."""

    def __init__(self, source):
        self._source, self._hash = source, hashlib.sha256()
        self.name = "<stdin>" if source == "-" else str(source)

    def __enter__(self):
        self._file: BinaryIO = open(0 if self._source == "-" else self._source, "rb", closefd=self._source != "-")
        return self

    def __exit__(self, *_):
        self._file.close()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@dataclass
class _Unit:
    """Sequences that are going to be computed together."""

    digests: list[bytes] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    residues: int = 0


class _Maker:
    def __init__(self, folder: Path, fields: dict, info: dict, policy: Policy):
        self.folder, self.fields, self.info = folder, fields, info
        self.policy, self.duplicates = policy, fields["duplicates"]
        self.report, self.dropped, self.renamed = Report(), 0, 0
        self.ids, self.seen = Ids(), Seen()
        self.unit, self.unit_residues, self.unit_rows = _Unit(), [], []
        self.rows = self.first = 0  # sequences and records so far
        self.stored_residues = 0

    def make(self, inputs: list, on_read: Callable[[], None], *, replace: bool) -> Plan:
        folder, hashes = self.folder, []
        with (
            layout.table(folder / layout.SEQUENCES, layout.SEQUENCE_FIELDS, {}) as self.sequences_table,
            layout.table(folder / layout.IDS, layout.ID_FIELDS, {}) as self.ids_table,
            layout.table(folder / layout.SKIPPED, layout.SKIPPED_FIELDS, {}) as self.skipped_table,
        ):
            for number, source in enumerate(inputs):
                with _Hashed(source) as stream:
                    for records in read_fasta(stream):
                        self._add(records, number)
                        on_read()
                    hashes.append(stream.sha256)
                self.first = self.report.records
            if not self.rows:
                raise DatasetError(f"nothing is left to compute: all {self.first} records were skipped")
            self._close_unit()
            fields = {"input": hashes} | self.fields
            _require_own_shards(folder, digest_of(fields))
        files = {name: sha256(folder / name) for name in layout.TABLES}
        content = {"fields": fields, "info": self.info | self._counts(), "files": files}
        write_json(folder / layout.PLAN, content, replace=replace)
        return Plan(folder, fields, content["info"], files, digest_of(fields))

    def _counts(self) -> dict:
        report = self.report
        skipped = {"unknown residue": report.skipped_unknown, "empty": report.empty, "duplicate": self.dropped}
        changed = {
            "unknown residues read as X": report.unknown,
            "final * stripped": report.stops_stripped,
            "truncated": report.truncated,
            "windowed": report.windowed,
            "duplicates renamed": self.renamed,
        }
        return {
            "requested": report.records,
            "skipped": skipped,
            "changed": changed,
            "sequences": self.rows,
            "residues": self.stored_residues,
            "unit_residues": self.unit_residues,
            "unit_rows": self.unit_rows,
        }

    def _add(self, records: Records, source: int) -> None:
        tokens = tokenize(records, self.policy, self.report)
        skipped = _skipped(records, tokens)
        local = (tokens.numbers - records.first).tolist()  # places in `records`
        wanted = [accession(header) for header in tokens.headers]
        given = self.ids.give(wanted, rename=self.duplicates == "keep")
        for i, name in enumerate(given):
            if name is None:
                self._refuse_or_skip(records, local[i], wanted[i], skipped)
        self.renamed += sum(name is not None and name != old for name, old in zip(given, wanted, strict=True))
        kept = [i for i, name in enumerate(given) if name is not None]
        texts = _texts(tokens)
        digests = [hashlib.sha256(texts[i].encode()).digest() for i in kept]
        rows = self._rows_of(digests, [texts[i] for i in kept], tokens.lengths[kept].tolist())
        numbers = [self.first + int(tokens.numbers[i]) for i in kept]
        self.ids_table.add([numbers, [given[i] for i in kept], [tokens.headers[i] for i in kept], rows, digests])
        if skipped:
            skipped.sort()
            lines = [int(records.lines[i]) for i, *_ in skipped]
            columns = [[self.first + records.first + i for i, *_ in skipped], [source] * len(skipped), lines]
            self.skipped_table.add([*columns, *map(list, list(zip(*skipped, strict=True))[1:])])

    def _refuse_or_skip(self, records: Records, i: int, name: str, skipped: list) -> None:
        if self.duplicates == "error":
            where = f"{records.source}: record {records.first + i + 1} (line {records.lines[i]})"
            raise DatasetError(
                f"{where}: the id {name!r} was there before; use --duplicates keep to store it under another name, or "
                "--duplicates skip to leave it out"
            )
        self.dropped += 1
        skipped.append((i, name, "duplicate", ""))

    def _rows_of(self, digests: list[bytes], texts: list[str], lengths: list[int]) -> list[int]:
        """The row of each sequence; those met for the first time join the unit."""
        keys = keys_of(digests)
        rows, fresh = self.seen.find(keys).tolist(), {}
        for i, digest in enumerate(digests):
            if rows[i] < 0 and digest not in fresh:
                self._join(digest, texts[i], lengths[i])
                fresh[digest] = (i, self.rows)
                self.rows += 1
            if rows[i] < 0:
                rows[i] = fresh[digest][1]
        places = [i for i, _ in fresh.values()]
        self.seen.add(keys[places], np.array([row for _, row in fresh.values()], dtype=np.int64))
        return rows

    def _join(self, digest: bytes, text: str, length: int) -> None:
        unit = self.unit
        if unit.residues and unit.residues + length > self.fields["unit_residues"]:
            self._close_unit()
            unit = self.unit
        unit.digests.append(digest)
        unit.lengths.append(length)
        unit.texts.append(text)
        unit.residues += length

    def _close_unit(self) -> None:
        unit, self.unit = self.unit, _Unit()
        self.sequences_table.add([unit.digests, unit.lengths, unit.texts])
        self.unit_residues.append(unit.residues)
        self.unit_rows.append(len(unit.texts))
        self.stored_residues += unit.residues


def _skipped(records: Records, tokens: Tokens) -> list[tuple[int, str, str, str]]:
    """(place in `records`, id, reason, detail) of those the policy left out."""
    left_out = np.ones(len(records), dtype=bool)
    left_out[tokens.numbers - records.first] = False
    found = []
    for i in np.flatnonzero(left_out).tolist():
        residues = records.residues[records.offsets[i] : records.offsets[i + 1]]
        _, _, unknown, column, _ = _C.encode_records(residues, np.array([0, len(residues)]))
        at = int(column[0])
        reason = ("unknown residue", f"{chr(residues[at])!r} at {at + 1}") if unknown[0] else ("empty", "")
        found.append((i, accession(records.headers[i]), *reason))
    return found


def _texts(tokens: Tokens) -> list[str]:
    """Each sequence as it is computed, in letters; tokens that are no letter are spelt as <mask>."""
    letters = _LETTERS[tokens.ids].tobytes().decode()
    bounds = tokens.offsets.tolist()
    texts = [letters[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    names = Alphabet().all_toks
    for i in [i for i, text in enumerate(texts) if "<" in text]:
        texts[i] = "".join(names[token] for token in tokens.ids[bounds[i] : bounds[i + 1]].tolist())
    return texts
