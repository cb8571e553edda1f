"""A checkpoint of any layout, told by its content."""

from pathlib import Path

from ..models.family import titles
from . import fair_esm, huggingface, native, regression
from .checkpoint import Checkpoint, CheckpointError
from .safe import kind_of, read_torch


def read(path: str | Path, *, verify: bool = False) -> Checkpoint:
    """Reads a checkpoint file or a Hugging Face folder, with the contact regression that lies beside it, if one does.

    Args:
        verify: also compare the prepacked matrices of a prepacked file with its checksum, which means to read them all.
            Otherwise their names and sizes are checked, and everything else in full.

    Raises:
        FileNotFoundError, CheckpointError.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    checkpoint, side = _read(path, verify), regression.beside(path)
    return checkpoint if side is None else regression.attach(checkpoint, side)


def _read(path: Path, verify: bool) -> Checkpoint:
    if path.is_dir():
        return huggingface.read_folder(path)
    if kind_of(path) == "safetensors":
        return native.read_file(path, verify)
    content = read_torch(path)
    if fair_esm.is_content(content):
        return fair_esm.read_content(path, content)
    if (path.parent / "config.json").exists():
        return huggingface.read_beside_config(path, content)
    raise CheckpointError(
        f"{path} is no checkpoint of {titles()}: expected fair-esm's 'args' and 'model', or a config.json beside it"
    )


def files_of(path: Path) -> list[Path]:
    """All that decides the numbers of the checkpoint at a path: that file, with the config.json that tells its sizes if
    it has none of its own, or the files of a folder. (A contact regression beside it decides contacts alone.)

    Raises CheckpointError.
    """
    if path.is_dir():
        return huggingface.files_of(path)
    config = path.with_name("config.json")
    whole = kind_of(path) == "safetensors" and native.is_own(path)
    return [path] if whole or not config.exists() else [config, path]


def prepacked_dtype(path: Path) -> str | None:
    """What the prepacked matrices of a file hold ("bfloat16", "int8" ...), read from its header; None without any."""
    if path.is_dir() or kind_of(path) != "safetensors" or not native.is_own(path):
        return None
    return native.metadata_of(path).get("packed")
