"""npz, NumPy's archive: written array by array, where numpy.savez wants them all in memory."""

import zipfile
from pathlib import Path

import numpy as np


class NpzWriter:
    """numpy.load(path)[key] gives back each array."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        self.archive = zipfile.ZipFile(self.path, "w")  # stored, as numpy.savez does: floats hardly compress
        return self

    def __exit__(self, *_):
        self.archive.close()

    def add(self, key: str, array: np.ndarray) -> None:
        with self.archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array(entry, array, allow_pickle=False)
