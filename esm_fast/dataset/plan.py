"""The plan of a data set, which decides everything that is in it."""

from dataclasses import dataclass
from pathlib import Path

from ..files.checked_json import DamagedError, read_json
from ..files.checksums import digest_of, sha256
from ..files.shapes import Maybe, Names, ShapeError, count, digest, require
from . import layout
from .errors import DatasetError
from .settings import Settings

_INFO = {"model": str, "sources": [str], "requested": count, "skipped": Names(count), "changed": Names(count)}
_INFO |= {"sequences": count, "residues": count, "unit_residues": [count], "unit_rows": [count]}
_INFO |= {"warning": Maybe(str)}
_FILES = dict.fromkeys(layout.TABLES, digest)
_PLAN = {"fields": {"format": str}, "info": _INFO, "files": _FILES}
_SMALL = 16 << 20  # bytes, which are hashed sooner than it is found out that they were
_RUN = {"format": str, "plan": digest, "counts": dict, "files": Names(digest)}


@dataclass(frozen=True)
class Plan:
    folder: Path
    settings: Settings
    info: dict  # counts, and names that decide nothing
    files: dict[str, str]  # SHA-256 of the plan's tables
    id: str

    @property
    def units(self) -> int:
        return len(self.info["unit_residues"])


def load(folder: Path) -> Plan:
    """Raises DatasetError where there is none, or a damaged one."""
    path = folder / layout.PLAN
    if not path.exists():
        raise DatasetError(f"{folder} is no data set: it has no {layout.PLAN}; esm-fast embed -o {folder} makes one")
    content = read(path, _PLAN)
    if content["fields"]["format"] != layout.FORMAT:
        raise DatasetError(f"{path} is of the format {content['fields']['format']!r}; this is {layout.FORMAT!r}")
    settings = Settings.from_json(content["fields"], path)
    info = content["info"]
    if len(info["unit_rows"]) != len(info["unit_residues"]) or sum(info["skipped"].values()) > info["requested"]:
        raise DatasetError(f"{path}: its counts do not fit each other; make the data set again")
    return Plan(folder, settings, content["info"], content["files"], digest_of(content["fields"]))


def require_planned(plan: Plan, table: str) -> None:
    """Raises DatasetError for a table that is not the plan's: of another data set, as an interrupted copy over an older
    one leaves it, each page may be sound. Large files are read once, and remembered as models are."""
    path = plan.folder / table
    try:
        found = sha256(path) if path.stat().st_size < _SMALL else _remembered(path)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing") from None
    if found != plan.files[table]:
        raise DatasetError(
            f"{path} is damaged, or of another data set: its SHA-256 is not the one in {layout.PLAN}. Copy the data "
            "set again, or remove this file and run the same embed command again"
        )


def _remembered(path: Path) -> str:
    from .. import weights  # which imports torch: small tables do without

    return weights.sha256(path)


def read_run(folder: Path) -> dict | None:
    """run.json, if it is there. Raises DatasetError."""
    path = folder / layout.RUN
    return read(path, _RUN) if path.exists() else None


def read(path: Path, shape: object) -> dict:
    """A JSON file of a data set. Raises DatasetError where a byte of it has changed, or it was never one."""
    try:
        content = read_json(path)
        require(content, shape, str(path))
    except (DamagedError, ShapeError) as error:
        raise DatasetError(f"{error}; make the data set again, or copy it again") from None
    return content
