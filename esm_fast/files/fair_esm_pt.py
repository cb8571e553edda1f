"""fair-esm's format: one .pt file a protein, a dictionary of fp32 tensors."""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch

from .atomic import atomic, remove_leftovers


class TorchFolder:
    """Writes {name}.pt files into a folder, which is made if need be."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        return self

    def __exit__(self, *_):
        pass

    def has(self, name: str) -> bool:
        """Whether the file is there and complete: what a killed fair-esm left is cut short, and lacks the zip's end."""
        return zipfile.is_zipfile(self.folder / f"{name}.pt")

    def add(self, name: str, label: str, entries: dict) -> None:
        """entries: arrays, or dictionaries {layer: array}, under fair-esm's keys."""
        content = {"label": label} | {key: _tensors(value) for key, value in entries.items()}
        # Not durable: a file cut short is written again by the next run.
        with atomic(self.folder / f"{name}.pt", durable=False, tidy=False) as temporary:
            save(content, temporary)


def save(content: dict, path: Path) -> None:
    """torch's format, written at once: of a full disk torch itself says "iostream error", and it puts the name of the
    file into it, which is a temporary one."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def _tensors(value: np.ndarray | dict[int, np.ndarray]):
    """Copies: torch.save stores all that a view looks into."""
    if isinstance(value, dict):
        return {key: _tensors(array) for key, array in value.items()}
    return torch.tensor(value, dtype=torch.float32)
