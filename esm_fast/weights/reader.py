"""A checkpoint of any layout, told by its content."""

from argparse import Namespace
from pathlib import Path

from . import fair_esm, huggingface, native
from .checkpoint import Checkpoint, CheckpointError
from .safe import is_safetensors, read_torch


def read(path: str | Path, *, verify: bool = False) -> Checkpoint:
    """Reads a checkpoint file or a Hugging Face folder.

    Args:
        verify: also compare the packed matrices of a packed file with its checksum, which means to read them all.
            Otherwise their names and sizes are checked, and everything else in full.

    Raises:
        FileNotFoundError, CheckpointError.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        return huggingface.read_folder(path)
    if is_safetensors(path):
        return native.read_file(path, verify)
    content = read_torch(path)
    if isinstance(content, dict) and isinstance(content.get("args"), Namespace) and "model" in content:
        return fair_esm.read_content(path, content)
    if isinstance(content, dict) and "cfg" in content:
        raise CheckpointError(f"{path} is an ESM-2 checkpoint (rotary positions); esm_fast reads ESM-1b and ESM-1v")
    if (path.parent / "config.json").exists():
        return huggingface.read_folder(path.parent)
    raise CheckpointError(
        f"{path} is no ESM-1b checkpoint: expected fair-esm's 'args' and 'model', or a config.json beside it"
    )
