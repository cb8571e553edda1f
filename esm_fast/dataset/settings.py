"""What decides the bytes of a data set, field by field."""

from dataclasses import asdict, dataclass, fields, replace

from ..files.shapes import Maybe, ShapeError, digest, positive, require
from .errors import DatasetError

_LATER = {
    "gaps": "error",
    "scan": "",
    "kernels": "",
}  # fields that came later, and their values where they are missing


@dataclass(frozen=True)
class Settings:
    """Two data sets of equal settings have the same bytes. `plan.json` has them under "fields"."""

    model: str  # SHA-256 of the checkpoint; random weights are what their name says
    layers: tuple[int, ...]
    width: int
    max_residues: int
    pool: str
    residues: bool  # whether every residue's numbers are kept
    store: str  # type of the numbers in the files
    dtype: str  # type they are computed in
    backend: str
    batch_tokens: int
    unit_residues: int
    unknown: str
    empty: str
    duplicates: str
    overlength: str
    format: str
    hardware: str
    esm_fast: str
    torch: str
    pyarrow: str
    gaps: str = "error"
    scan: str = ""  # of variants: strategy and window, such as "wt brandes"; "" for embeddings
    kernels: str = ""  # the choices of `ops.verdicts`, where they differ from the order of backends
    input: tuple[str, ...] = ()  # SHA-256 of each file; empty before it is read

    def with_input(self, hashes: list[str]) -> "Settings":
        return replace(self, input=tuple(hashes))

    def to_json(self) -> dict:
        """In the order of plan.json. A field that came later is there only where it is not its default."""
        content = asdict(self) | {"layers": list(self.layers)}
        content = {name: value for name, value in content.items() if _LATER.get(name) != value}
        return {"input": list(content.pop("input"))} | content

    @staticmethod
    def from_json(content: dict, where) -> "Settings":
        """Raises DatasetError for fields that this version does not know, or misses."""
        known = {field.name for field in fields(Settings)}
        if strange := sorted(set(content) - known):
            raise DatasetError(f"{where} was made by another version: this one does not know {', '.join(strange)}")
        try:
            require(content, _SHAPE, f"{where}, 'fields'")
        except ShapeError as error:
            raise DatasetError(f"{error}; make the data set again, or copy it again") from None
        settings = Settings(**content)
        return replace(settings, layers=tuple(settings.layers), input=tuple(settings.input))

    def differences(self, before: "Settings") -> str:
        """In words, what is another one than before; empty where all is the same."""
        now, was = self.to_json(), before.to_json()
        names = [field.name for field in fields(Settings) if now.get(field.name) != was.get(field.name)]
        return "; ".join(f"{name} is {_shown(now, name)!r}, and was {_shown(was, name)!r}" for name in names)


def _layer(value: object) -> str | None:
    return None if type(value) is int and 0 <= value <= 100_000 else "expected the number of a layer"


_KINDS = {int: positive, bool: bool, str: str, tuple[int, ...]: [_layer], tuple[str, ...]: [digest]}
_SHAPE = {field.name: _KINDS[field.type] for field in fields(Settings)}
_SHAPE = {name: Maybe(shape) if name in _LATER else shape for name, shape in _SHAPE.items()}


def _shown(content: dict, name: str):
    return content.get(name, _LATER.get(name))
