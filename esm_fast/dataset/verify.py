"""Whether a data set is complete and intact, found out by reading its files: expected = requested - skipped."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_safetensors

from ..files.atomic import remove_leftovers
from ..files.checked_json import write_json
from ..files.checksums import sha256
from . import layout, units
from .errors import DatasetError
from .plan import Plan, load, read_run


@dataclass
class Findings:
    problems: list[str] = field(default_factory=list)  # each names its file
    status: Counter = field(default_factory=Counter)  # of the sequences that are there
    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 of the shards
    bytes: int = 0

    @property
    def failed(self) -> int:
        """Sequences that have no numbers, for a reason that is recorded."""
        return sum(count for status, count in self.status.items() if not units.has_numbers(status))


def verify(folder: Path, on_unit: Callable[[int], None] = lambda residues: None) -> tuple[Plan, Findings]:
    """Reads every byte. Raises DatasetError where there is no readable plan."""
    plan, found = load(folder), Findings()
    found.problems += _plan_problems(plan)
    if found.problems:  # shards are compared with the plan's sequences
        return plan, found
    try:
        run = read_run(folder)
    except DatasetError as error:
        return plan, Findings([str(error)])
    sequences = units.Sequences(plan)
    for number in range(plan.units):
        try:
            _check_unit(plan, sequences.unit(number), run and run["files"], found)
        except DatasetError as error:
            found.problems.append(str(error))
        on_unit(plan.info["unit_residues"][number])
    found.problems += _strange_files(plan)
    if run is not None and not found.problems and run != _summary(plan, found):
        found.problems.append(f"{folder / layout.RUN} was written for another plan or other counts")
    return plan, found


def finish(folder: Path, on_unit: Callable[[int], None] = lambda residues: None) -> tuple[Plan, Findings]:
    """Verifies, and writes run.json where nothing is wrong or missing: the last file of a data set."""
    for part in (folder, folder / layout.POOLED, folder / layout.RESIDUES):
        remove_leftovers(part)
    plan, found = verify(folder, on_unit)
    if not found.problems and not (folder / layout.RUN).exists():
        write_json(folder / layout.RUN, _summary(plan, found))
    return plan, found


def _summary(plan: Plan, found: Findings) -> dict:
    info = plan.info
    expected = info["requested"] - sum(info["skipped"].values())
    counts = {"requested": info["requested"], "skipped": info["skipped"], "expected": expected}
    counts |= {"sequences": info["sequences"], "status": dict(sorted(found.status.items()))}
    return {"format": layout.FORMAT, "plan": plan.id, "counts": counts, "files": found.hashes}


def _plan_problems(plan: Plan) -> list[str]:
    """Tables that do not match their checksum are not looked into."""
    problems = []
    for name, wanted in plan.files.items():
        path = plan.folder / name
        try:
            if sha256(path) != wanted:
                problems.append(f"{path} is damaged: its SHA-256 is not the one in {layout.PLAN}")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return problems or list(_record_problems(plan))


def _record_problems(plan: Plan) -> Iterator[str]:
    """Each record requested is there once: in the ids, with a sequence that hashes as it says, or among the skipped."""
    folder, info = plan.folder, plan.info
    digests = bytearray()
    for group in _groups(folder / layout.SEQUENCES):
        hashed = [hashlib.sha256(text.encode()).digest() for text in group["sequence"].to_pylist()]
        if hashed != group["digest"].to_pylist():
            yield f"{folder / layout.SEQUENCES}: a sequence does not match its digest"
        digests += b"".join(hashed)
    of_row = np.frombuffer(digests, dtype="V32")
    if sum(_rows(folder / table) for table in (layout.IDS, layout.SKIPPED)) != info["requested"]:
        yield f"{folder}: {layout.PLAN} has {info['requested']:,} records, and the tables of ids and skipped have not"
        return
    there = np.zeros(info["requested"], dtype=np.int64)
    for group in _groups(folder / layout.IDS):
        rows = group["row"].to_numpy()
        claimed = np.frombuffer(b"".join(group["digest"].to_pylist()), dtype="V32")
        if rows.size and (rows.max() >= len(of_row) or (of_row[rows] != claimed).any()):
            yield f"{folder / layout.IDS}: an id leads to another sequence than its digest says"
        np.add.at(there, group["record"].to_numpy(), 1)
    reasons: Counter = Counter()
    for group in _groups(folder / layout.SKIPPED):
        reasons.update(group["reason"].to_pylist())
        np.add.at(there, group["record"].to_numpy(), 1)
    if len(of_row) != info["sequences"] or sum(info["unit_rows"]) != len(of_row):
        yield f"{folder / layout.SEQUENCES} has {len(of_row)} sequences, and {layout.PLAN} {info['sequences']}"
    if dict(reasons) != {reason: count for reason, count in info["skipped"].items() if count}:
        yield f"{folder / layout.SKIPPED} has other counts than {layout.PLAN}"
    wrong = np.flatnonzero(there != 1)
    if len(wrong):
        yield f"{folder}: {len(wrong)} records are not there exactly once, the first of them record {wrong[0] + 1}"


def _rows(path: Path) -> int:
    with layout.open_table(path) as file:
        return file.metadata.num_rows


def _groups(path: Path):
    with layout.open_table(path) as file:
        yield from layout.row_groups(file, path)


def _check_unit(plan: Plan, unit: units.Unit, known: dict[str, str] | None, found: Findings) -> None:
    """known: the checksums of shards in run.json. A file that does not match is not looked into."""
    path = layout.pooled_path(plan.folder, unit.number)
    _note(path, known, found, plan)
    with units.reading(path):
        status, finite, residues_sha256 = _pooled(plan, unit, path, unknown=known is None)
    wanted = np.array([units.has_numbers(word) for word in status])
    if (finite != wanted).any():
        raise DatasetError(f"{path}: a row's numbers are missing or not finite, and its status does not say so")
    found.status.update(status)
    if not plan.settings.residues:
        return
    path = layout.residues_path(plan.folder, unit.number)
    _note(path, known or {_name(path, plan): residues_sha256}, found, plan)
    with units.reading(path):
        arrays = load_safetensors(path.read_bytes())
    if arrays["offsets"].tolist() != [0, *np.cumsum(unit.lengths).tolist()]:
        raise DatasetError(f"{path} has other sequences than its plan")
    for layer in plan.settings.layers:
        if (np.isfinite(arrays[f"layer_{layer}"]).all(axis=1) != np.repeat(wanted, unit.lengths)).any():
            raise DatasetError(f"{path}: a row's numbers are not finite, and its status does not say so")


def _pooled(plan: Plan, unit: units.Unit, path: Path, unknown: bool) -> tuple[list[str], np.ndarray, str]:
    """The status of each row, whether its numbers are there and finite, and the residues' checksum.

    unknown: nothing has recorded this file's checksum yet.
    """
    with units.open_pooled(plan, unit.number) as file:
        group, metadata = layout.read_group(file, path, 0), file.schema_arrow.metadata
    if unknown and not _canonical(plan, group, path):
        raise DatasetError(f"{path} is damaged: it is not the file that its own contents make")
    if group["digest"].to_pylist() != unit.digests or group["length"].to_pylist() != unit.lengths.tolist():
        raise DatasetError(f"{path} has other sequences than its plan")
    finite = np.ones(len(group), dtype=bool)
    for layer in plan.settings.layers:
        finite &= np.isfinite(units.matrix(group[f"layer_{layer}"], plan.settings.width)).all(axis=1)
    residues = metadata[b"residues_sha256"].decode() if plan.settings.residues else ""
    return group["status"].to_pylist(), finite, residues


def _canonical(plan: Plan, group, path: Path) -> bool:
    """Pages have checksums, the rest of a Parquet file has none: but one version has one way only to write it."""
    same_version = plan.settings.pyarrow == layout.pa.__version__
    return not same_version or layout.encoded(group, units.fields_of(plan)) == path.read_bytes()


def _note(path: Path, known: dict[str, str] | None, found: Findings, plan: Plan) -> None:
    """The checksum of a file, which has to be the one that is known."""
    name = _name(path, plan)
    try:
        digest = sha256(path)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing") from None
    if known is not None and digest != known.get(name):
        raise DatasetError(f"{path} is damaged: its SHA-256 is not the one that was recorded")
    found.hashes[name] = digest
    found.bytes += path.stat().st_size


def _name(path: Path, plan: Plan) -> str:
    return str(path.relative_to(plan.folder))


def _strange_files(plan: Plan) -> Iterator[str]:
    wanted = {layout.pooled_path(plan.folder, unit) for unit in range(plan.units)}
    if plan.settings.residues:
        wanted |= {layout.residues_path(plan.folder, unit) for unit in range(plan.units)}
    for name in (layout.POOLED, layout.RESIDUES):
        for path in sorted((plan.folder / name).glob("*")):
            if path not in wanted and not path.name.startswith("."):  # partial ones, and what desktops and NFS leave
                yield f"{path} is no part of this data set"
