"""Files of tensors, read without running code: safetensors, and torch's with tensors and plain containers only."""

from argparse import Namespace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .checkpoint import CheckpointError


def is_safetensors(path: Path) -> bool:
    """A safetensors file begins with the length of its header, and the header is a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and length <= path.stat().st_size


class safetensors_errors:
    """Turns what safetensors says of a damaged file into a CheckpointError."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, SafetensorError):
            raise CheckpointError(f"{self.path} is damaged or incomplete: {error}") from None


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with safetensors_errors(path), safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)


def read_torch(path: Path) -> dict:
    """torch.load of tensors and plain containers only, memory-mapped when the file allows it. There is no fallback."""
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        if zipped:
            unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace"}
            if unsafe:
                raise CheckpointError(f"{path} would run code when loaded ({', '.join(sorted(unsafe))}); it was not")
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many types for damaged files, none of them specific
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from None
