"""A data set in the formats that other tools open: each written whole, or not at all."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..console.streams import printable
from ..files.atomic import atomic
from ..files.fair_esm_pt import TorchFolder
from ..files.hdf5 import HDF5Writer, unstorable
from ..sequences.names import Ids, file_name, hdf5_key
from .reader import Dataset
from .units import has_numbers


class Ask(NamedTuple):
    layer: int
    residues: bool  # (residues, width) of each protein, in place of (width,)
    on_protein: Callable[[], None] = lambda: None


def _proteins(data: Dataset, ask: Ask) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each protein that has an embedding, and the embedding."""
    for number in range(len(data)):
        if has_numbers(data.status(number)):
            yield number, (data.residues if ask.residues else data.embedding)(number, ask.layer)
        ask.on_protein()


def uniprot_h5(data: Dataset, out: Path, ask: Ask) -> None:
    """As UniProt publishes embeddings, and as `esm-fast embed -o OUT.h5` writes them: a data set an id."""
    for name, header in zip(data.ids, data.headers, strict=True):
        if what := unstorable(header):
            raise ValueError(f"the header of {name!r} holds {what}; choose another format")
    names = Ids().give([hdf5_key(name) for name in data.ids], rename=True)
    with _h5(data, out, ask) as write:
        for number, array in _proteins(data, ask):
            write(names[number], data.headers[number], array)


def bio_embeddings_h5(data: Dataset, out: Path, ask: Ask) -> None:
    """As bio_embeddings wrote them: the key is the MD5 of the sequence, the attribute original_id its first id."""
    with _h5(data, out, ask) as write:
        written = set()
        for number, array in _proteins(data, ask):
            key = hashlib.md5(data.sequence(number).encode()).hexdigest()
            if key not in written:
                write(key, data.ids[number], array)
            written.add(key)


@contextmanager
def _h5(data: Dataset, out: Path, ask: Ask) -> Iterator[Callable]:
    """Yields a function that writes one protein."""
    settings, info = data.plan.settings, data.plan.info
    attributes = {name: getattr(settings, name) for name in ("dtype", "overlength", "max_residues", "esm_fast")}
    attributes |= {"model": info["model"], "plan": data.plan.id, "layers": [ask.layer]}
    attributes["pool"] = "per-residue" if ask.residues else settings.pool
    if "warning" in info:
        attributes["warning"] = info["warning"]
    with (
        atomic(out) as temporary,
        HDF5Writer(temporary, [ask.layer], store=settings.store, attributes=attributes) as h5,
    ):
        yield lambda key, header, array: h5.add(key, header, [array])


def ids_of(out: Path) -> Path:
    """Where the ids of a matrix go: a line each, control characters escaped."""
    return out.with_suffix(".ids.txt")


def npy(data: Dataset, out: Path, ask: Ask) -> None:
    """One matrix, which numpy.load(mmap_mode="r") opens without reading it, and beside it an id a line."""
    if ask.residues:
        raise ValueError("npy is one matrix, which proteins of different lengths do not fit in; choose another format")
    numbers = [number for number in range(len(data)) if has_numbers(data.status(number))]
    shape, dtype = (len(numbers), data.plan.settings.width), np.dtype(data.plan.settings.store)
    with atomic(ids_of(out)) as ids, atomic(out) as temporary:
        ids.write_text("".join(f"{printable(data.ids[number])}\n" for number in numbers), encoding="utf-8")
        rows = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        for row, (_, array) in enumerate(_proteins(data, ask)):
            rows[row] = array
        rows.flush()


def pt(data: Dataset, out: Path, ask: Ask) -> None:
    """A folder as fair-esm's extract.py fills it, a file a protein."""
    pool = data.plan.settings.pool
    key = "representations" if ask.residues else {"cls": "bos_representations"}.get(pool, f"{pool}_representations")
    names = Ids().give([file_name(header) for header in data.headers], rename=True)
    with TorchFolder(out) as folder:
        for number, array in _proteins(data, ask):
            header = data.headers[number]
            folder.add(names[number], header, {key: {ask.layer: array}})


FORMATS = {"uniprot-h5": uniprot_h5, "bio-embeddings-h5": bio_embeddings_h5, "npy": npy, "pt": pt}
