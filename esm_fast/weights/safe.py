"""Files of tensors, read without running code: safetensors, and torch's with tensors and plain containers only.

Whatever else a path leads to is told by its first bytes, so that the error can say what it is and what to do.
"""

import json
import re
from argparse import Namespace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from . import integrity
from .checkpoint import CheckpointError, raise_problems, shown

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"  # torch's format before 1.6 is a row of pickles
_LONGEST_JSON = 64 << 20  # of configurations and indices, which have a few hundred kB
_MODEL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LARGEST_TENSOR = 1 << 36  # numbers
_INTEGERS = (torch.int64, torch.int32)
_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run 'git lfs pull', or download the file"),
    (rb"\s*<(!doctype|html|head|\?xml)", "a web page, not the file itself: download it again, and log in first"),
    (rb"\s*[\[{]", "JSON, not a file of tensors: give the folder it lies in, or the file of tensors beside it"),
    (rb"\x1f\x8b", "compressed with gzip: unpack it first"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"\x89HDF", "an HDF5 file, not a checkpoint"),
    (b">", "a FASTA file, not a checkpoint"),
)


def kind_of(path: Path) -> str:
    """ "safetensors", "zip" or "legacy" (torch's two formats). Raises CheckpointError for anything else."""
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a file nor a folder")
    with path.open("rb") as file:
        start = file.read(512)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length <= path.stat().st_size:  # the length of a header, which is a JSON object
        return "safetensors"
    if start.startswith(_ZIP):
        return "zip"
    if start.startswith(_PICKLE):
        return "legacy"
    if not start:
        raise CheckpointError(f"{path} is empty; download or write it again")
    for pattern, what in _FOREIGN:
        if re.match(pattern, start, re.IGNORECASE):
            raise CheckpointError(f"{path} is {what}")
    raise CheckpointError(f"{path} cannot be read as a checkpoint of tensors: it is neither torch's nor safetensors")


class safetensors_errors:
    """Turns what safetensors says of a damaged file into a CheckpointError."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if not isinstance(error, SafetensorError):
            return
        if "not valid UTF-8" in str(error) and not str(self.path).isprintable():
            raise CheckpointError(f"{self.path}: the name is not UTF-8, which safetensors needs; rename it") from None
        raise CheckpointError(f"{self.path} is damaged or incomplete: {error}") from None


def read_tensors(path: Path) -> dict:
    """All that a file of tensors holds, by name."""
    return read_safetensors(path) if kind_of(path) == "safetensors" else read_torch(path)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    integrity.require_as_named(path)
    with safetensors_errors(path), safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)


def read_torch(path: Path) -> dict:
    """torch.load of tensors and plain containers only, memory-mapped when the file allows it. There is no fallback."""
    zipped = kind_of(path) == "zip"
    integrity.require_as_named(path)
    if zipped:
        integrity.require_intact_archive(path)
    try:
        if zipped:
            unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace"}
            if unsafe:
                raise _would_run_code(path, sorted(unsafe))
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many types for damaged files, none of them specific
        if named := re.search(r"(?:Unsupported|unsafe) (?:global|class)\W+(?:GLOBAL )?([\w.]+)", str(error)):
            raise _would_run_code(path, [named[1]]) from None
        # Not torch's own words: they advise to load it without this safety.
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of tensors: it is damaged, or holds something else "
            f"({type(error).__name__}); download or write it again"
        ) from None


def _would_run_code(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(f"{path} would run code when loaded ({', '.join(names)}); it was not")


def read_json(path: Path) -> dict:
    """A JSON object; CheckpointError for anything else, naming the file."""
    if path.stat().st_size > _LONGEST_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, which is no configuration; download it again")
    data = path.read_bytes()
    for pattern, what in _FOREIGN[:2]:
        if re.match(pattern, data, re.IGNORECASE):
            raise CheckpointError(f"{path} is {what}")
    return parsed_json(data, path)


def parsed_json(text: bytes | str, source: object) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{source} is not JSON: {reason}; download or write it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} holds {type(content).__name__} in the place of a JSON object of names")
    return content


def require_tensors(source: Path, content: object) -> dict[str, torch.Tensor]:
    """What a file holds, if it is ordinary tensors of numbers by name; else CheckpointError naming those that are not.

    Integers may be among them, such as numbers of positions, which no family reads.
    """
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{source} is no checkpoint: expected tensors by name, found {type(content).__name__}")
    integers = {key for key, t in content.items() if isinstance(t, torch.Tensor) and t.dtype in _INTEGERS}
    require_dense(source, {key: tensor for key, tensor in content.items() if key not in integers})
    return content


def require_dense(source: Path, tensors: dict) -> dict[str, torch.Tensor]:
    """Raises CheckpointError naming each value that is no ordinary tensor of numbers."""
    problems = []
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _MODEL_DTYPES:
            problems.append(f"{shown(key)} is no floating-point tensor")
        elif tensor.layout != torch.strided or tensor.device.type != "cpu":
            problems.append(f"{shown(key)} has no values in memory ({tensor.layout}, {tensor.device})")
        elif tensor.numel() > _LARGEST_TENSOR:  # one number, repeated by strides of 0
            problems.append(f"{shown(key)} has shape {tuple(tensor.shape)}, larger than any model's")
    raise_problems(source, problems)
    return tensors
