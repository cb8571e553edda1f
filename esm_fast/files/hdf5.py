"""HDF5 as UniProt publishes embeddings: one data set a protein, its name the accession."""

import io
import os
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
        self._disk = _Disk(self.path)
        self.file = h5py.File(self._disk, "w")
        self.file.attrs.update(self.attributes)
        # A layer's group exists even when no protein is written.
        several = len(self.layers) > 1
        self.groups = [self.file.create_group(f"layer_{n}") if several else self.file for n in self.layers]
        return self

    def __exit__(self, kind, *_):
        try:
            self.file.close()
        finally:
            self._disk.close()
        if kind is None:
            self._disk.check()

    def add(self, key: str, header: str, arrays: list[np.ndarray]) -> None:
        """One array a layer. Raises ValueError for a number that is not finite as it would be stored."""
        for layer, group, array in zip(self.layers, self.groups, arrays, strict=True):
            with np.errstate(over="ignore"):
                stored = array.astype(self.store, copy=False)
            check_finite(stored, array, f"layer {layer} of {header!r}")
            group.create_dataset(key, data=stored).attrs["original_id"] = header
            self._disk.check()


class _Disk(io.RawIOBase):
    """The file under HDF5, which crashes where a write fails: it is told that all went well, and `check` tells us.

    What could not be written stays in memory, since HDF5 reads back what it wrote; that is little, as `check` is called
    after each protein.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, open(path, "w+b", buffering=0)  # noqa: SIM115, closed by close
        self._at, self._error, self._unwritten = 0, None, []

    def check(self) -> None:
        """Raises OSError for the first write that failed."""
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, str(self._path))

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        at = 0
        try:
            while at < len(view) and self._error is None:  # the system may take a part only
                at += os.pwrite(self._file.fileno(), view[at:], self._at + at)
        except OSError as error:
            self._error = error
        if at < len(view):
            self._unwritten.append((self._at + at, bytes(view[at:])))
        self._at += len(view)
        return len(view)

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        view[:] = os.pread(self._file.fileno(), len(view), self._at).ljust(len(view), b"\0")
        for start, data in self._unwritten:
            begin, end = max(start, self._at), min(start + len(data), self._at + len(view))
            if begin < end:
                view[begin - self._at : end - self._at] = data[begin - start : end - start]
        self._at += len(view)
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = os.fstat(self._file.fileno()).st_size
        size = max([size, *(start + len(data) for start, data in self._unwritten)])
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def truncate(self, size: int | None = None) -> int:
        size = self._at if size is None else size
        try:
            if self._error is None:
                os.ftruncate(self._file.fileno(), size)
        except OSError as error:
            self._error = error
        return size

    def flush(self) -> None:
        pass

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


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
