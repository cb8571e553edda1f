"""Making the plan of a data set: every record's id, every distinct sequence once, cut into units, before any computing.

One pass over the input, in memory of one unit and 60 to 76 bytes a record. The plan holds the sequences themselves, so
that workers need the input no more than to see that it is still the same.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..alphabet import Alphabet
from ..files.atomic import alone, remove_leftovers
from ..files.checked_json import write_json
from ..files.checksums import digest_of, sha256
from ..sequences.fasta import MAX_RECORD, require_standard_input
from ..sequences.ingest import Batch, Counts, Ingest
from ..sequences.seen import Seen, keys_of
from ..sequences.tokenize import Policy, Tokens
from . import layout
from .errors import DatasetError
from .plan import Plan, load, require_planned
from .settings import Settings

_LETTERS = np.frombuffer("".join(t if len(t) == 1 else "<" for t in Alphabet().all_toks).encode(), dtype=np.uint8)
_READ_BYTES = 1 << 20


def make_or_resume(
    folder: Path,
    inputs: list,
    settings: Settings,
    info: dict,
    *,
    max_record: int = MAX_RECORD,
    on_read: Callable[[], None] = lambda: None,
) -> Plan:
    """The plan in the folder, if it is the one that these arguments make; else a new one.

    inputs: FASTA paths, or "-". settings: without the input. on_read: called now and then; may raise.
    Raises DatasetError for another plan, naming the fields that differ; FastaError for input that the settings do not
    allow.
    """
    maker = _Maker(folder, settings, info, max_record)
    with _alone_in(folder) as held:
        if not (folder / layout.PLAN).exists():
            _require_own(folder)
            remove_leftovers(folder)
            with suppress(FileExistsError):  # without locks, another process may have been first
                return maker.make(inputs, on_read, replace=held)
    plan = load(folder)
    require_same(plan, settings)
    require_same(plan, settings.with_input([_hash_of(source, on_read) for source in inputs]))
    with alone(folder / layout.LOCK):
        if not all((folder / name).exists() for name in layout.TABLES):  # a damaged one was removed
            maker.make(inputs, on_read, replace=True)
    require_planned(plan, layout.SEQUENCES)  # what would be computed
    return plan


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Makes the folder where it is not there, and is alone in it; see `alone`.

    Where that ends in an error before anything is in the folder, it is as it was before, or not there.
    """
    with ExitStack() as stack:
        while True:
            made = not folder.exists()
            folder.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):  # another process failed, and removed the folder that it had made
                held = stack.enter_context(alone(folder / layout.LOCK))
                break
        try:
            yield held
        except BaseException:
            if held and os.listdir(folder) == [layout.LOCK]:
                (folder / layout.LOCK).unlink()
                if made:
                    folder.rmdir()
            raise


def require_same(plan: Plan, settings: Settings) -> None:
    """Raises DatasetError naming the fields that differ; the input only where the settings have one."""
    if said := settings.differences(plan.settings if settings.input else plan.settings.with_input([])):
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
    stream = _Hashed(source)
    while stream.read(_READ_BYTES):
        on_read()
    return stream.sha256


class _Hashed:
    """A binary file, open from its first byte to its last, that knows the SHA-256 of what was read from it."""

    def __init__(self, source):
        self._source, self._hash = source, hashlib.sha256()
        self._file: BinaryIO | None = None
        self.name = "<stdin>" if source == "-" else str(source)

    def read(self, size: int) -> bytes:
        if self._file is None:
            if self._source == "-":
                require_standard_input()
            source, closes = (0, False) if self._source == "-" else (self._source, True)
            self._file = open(source, "rb", closefd=closes)  # noqa: SIM115, closed at its end
        data = self._file.read(size)
        self._hash.update(data)
        if not data:
            self._file.close()
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
    def __init__(self, folder: Path, settings: Settings, info: dict, max_record: int):
        self.folder, self.settings, self.info = folder, settings, info
        policy = Policy(settings.unknown, settings.empty, settings.overlength, settings.max_residues, settings.gaps)
        self.ingest = Ingest(policy, duplicates=settings.duplicates, max_record=max_record)
        self.counts, self.seen = Counts(), Seen()
        self.unit, self.unit_residues, self.unit_rows = _Unit(), [], []
        self.rows = self.stored_residues = 0  # so far

    def make(self, inputs: list, on_read: Callable[[], None], *, replace: bool) -> Plan:
        folder, hashed = self.folder, [_Hashed(source) for source in inputs]
        with (
            layout.table(folder / layout.SEQUENCES, layout.SEQUENCE_FIELDS, {}) as self.sequences_table,
            layout.table(folder / layout.IDS, layout.ID_FIELDS, {}) as self.ids_table,
            layout.table(folder / layout.SKIPPED, layout.SKIPPED_FIELDS, {}) as self.skipped_table,
        ):
            for batch in self.ingest.read(hashed, self.counts):
                self._add(batch)
                on_read()
            if not self.rows:
                records = self.counts.report.records
                raise DatasetError(f"nothing is left to compute: all {records} records were skipped")
            self._close_unit()
            settings = self.settings.with_input([source.sha256 for source in hashed])
            fields = settings.to_json()
            _require_own_shards(folder, digest_of(fields))
        files = {name: sha256(folder / name) for name in layout.TABLES}
        content = {"fields": fields, "info": self.info | self._counts(), "files": files}
        write_json(folder / layout.PLAN, content, replace=replace)
        return Plan(folder, settings, content["info"], files, digest_of(fields))

    def _counts(self) -> dict:
        return {
            "requested": self.counts.report.records,
            "skipped": self.counts.skipped,
            "changed": self.counts.changed,
            "sequences": self.rows,
            "residues": self.stored_residues,
            "unit_residues": self.unit_residues,
            "unit_rows": self.unit_rows,
        }

    def _add(self, batch: Batch) -> None:
        tokens = batch.tokens
        texts = _texts(tokens)
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        rows = self._rows_of(digests, texts, tokens.lengths.tolist())
        numbers = [batch.first + int(number) for number in tokens.numbers]
        self.ids_table.add([numbers, batch.ids, tokens.headers, rows, digests])
        if batch.skipped:
            self.skipped_table.add(list(map(list, zip(*batch.skipped, strict=True))))

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
        if unit.residues and unit.residues + length > self.settings.unit_residues:
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


def _texts(tokens: Tokens) -> list[str]:
    """Each sequence as it is computed, in letters; tokens that are no letter are spelt as <mask>."""
    letters = _LETTERS[tokens.ids].tobytes().decode()
    bounds = tokens.offsets.tolist()
    texts = [letters[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    names = Alphabet().all_toks
    for i in [i for i, text in enumerate(texts) if "<" in text]:
        texts[i] = "".join(names[token] for token in tokens.ids[bounds[i] : bounds[i + 1]].tolist())
    return texts
