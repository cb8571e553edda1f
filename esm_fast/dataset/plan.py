"""The plan of a data set, which decides everything that is in it."""

from dataclasses import dataclass
from pathlib import Path

from ..files.checked_json import DamagedError, read_json
from ..files.checksums import digest_of
from . import layout
from .errors import DatasetError
from .settings import Settings


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
    content = read(path)
    if content["fields"]["format"] != layout.FORMAT:
        raise DatasetError(f"{path} is of the format {content['fields']['format']!r}; this is {layout.FORMAT!r}")
    settings = Settings.from_json(content["fields"], path)
    return Plan(folder, settings, content["info"], content["files"], digest_of(content["fields"]))


def read(path: Path) -> dict:
    """plan.json or run.json. Raises DatasetError where a byte of it has changed."""
    try:
        return read_json(path)
    except DamagedError as error:
        raise DatasetError(str(error)) from None
