"""HDF5 as UniProt publishes embeddings: one data set a protein, its name the accession."""

from pathlib import Path

import h5py
import numpy as np

# Bytes a data set costs beside its numbers and its header; measured on many small ones.
OVERHEAD = 550


class HDF5Writer:
    """Writes {layer: array} of each protein: at the top of the file for one layer, in groups layer_<n> for several.

    Data sets carry the whole FASTA header as the attribute original_id.
    """

    def __init__(self, path: Path, layers: list[int], *, store: str, attributes: dict):
        self.path, self.layers, self.store, self.attributes = path, layers, store, attributes

    def __enter__(self):
        self.file = h5py.File(self.path, "w", locking=False)
        self.file.attrs.update(self.attributes)
        # A layer's group exists even when no protein is written.
        several = len(self.layers) > 1
        self.groups = [self.file.create_group(f"layer_{n}") if several else self.file for n in self.layers]
        return self

    def __exit__(self, *_):
        self.file.close()

    def add(self, key: str, header: str, arrays: list[np.ndarray]) -> None:
        """One array a layer. Raises ValueError for a number that is not finite as it would be stored."""
        for layer, group, array in zip(self.layers, self.groups, arrays, strict=True):
            with np.errstate(over="ignore"):
                stored = array.astype(self.store, copy=False)
            check_finite(stored, array, f"layer {layer} of {header!r}")
            group.create_dataset(key, data=stored).attrs["original_id"] = header


def unstorable(header: str) -> str | None:
    """What an attribute cannot hold of a header."""
    return "a NUL character, which HDF5 cannot store" if "\0" in header else None


def check_finite(stored: np.ndarray, computed: np.ndarray, what: str) -> None:
    """Raises ValueError for NaN or infinity, telling a model that made it from a format too small for the number."""
    if np.isfinite(stored).all():
        return
    if np.isfinite(computed).all():
        largest = np.abs(computed).max()
        raise ValueError(f"{what} holds {largest:.6g}, more than {stored.dtype} can store; store float32")
    raise ValueError(f"{what} holds NaN or infinity; compute in float32 or bfloat16")
