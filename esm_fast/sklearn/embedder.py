"""Embeddings as a scikit-learn transformer: protein sequences in, a row of features each out."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from .. import _C, __version__, hub, weights
from ..files.checksums import digest_of
from ..inference.dtype import fastest
from ..inference.embed import embed, layer_numbers
from ..inference.load import load
from ..inference.outputs import pools
from . import rows as rows_kept
from .rows import KEPT


class EsmEmbedder(TransformerMixin, BaseEstimator):
    """Turns protein sequences into a matrix of pooled embeddings, (proteins, len(layers) * embed_dim) float32.

    Nothing is learned from the data, so a pipeline may be cross-validated with it inside, and a sequence is computed
    once however many folds and candidates ask for it: rows are kept by the sequence's digest, in memory, and with
    `cache` on disk, where several processes share them. Clones and pickles hold the parameters only.

    Args:
        model: a name or path, see `esm_fast.load`.
        layers: a number or several; the features of several stand beside each other. Negative ones count from the last.
        pool: "mean", "max", "std" or "cls", see `esm_fast.embed`.
        dtype: "float32", "bfloat16", "int8" ..., or "auto": the fastest type that is proven here.
        device, backend: see `esm_fast.load`.
        unknown: for residues ESM-1b does not know: "error", or "x" (read as X). overlength: see `esm_fast.embed`; here
            proteins that are too long are computed in windows unless asked otherwise.
        batch_tokens: see `esm_fast.embed`.
        cache: a file to keep rows in (SQLite), or None.

    Examples:
        >>> make_pipeline(EsmEmbedder(), StandardScaler(), RidgeCV()).fit(sequences, activities)  # doctest: +SKIP
    """

    def __init__(
        self,
        model="esm1b_t6_demo",
        *,
        layers=-1,
        pool="mean",
        dtype="float32",
        device="auto",
        backend=None,
        unknown="error",
        overlength="window",
        batch_tokens=None,
        cache=None,
    ):
        self.model = model
        self.layers = layers
        self.pool = pool
        self.dtype = dtype
        self.device = device
        self.backend = backend
        self.unknown = unknown
        self.overlength = overlength
        self.batch_tokens = batch_tokens
        self.cache = cache

    def fit(self, X, y=None):
        """Loads the model and checks the parameters and sequences. Raises ValueError, TypeError, FileNotFoundError."""
        _strings(X)
        if self.pool not in pools("protein"):
            raise ValueError(f"pool is {self.pool!r}; choose one of {', '.join(pools('protein'))}")
        if self.unknown not in ("error", "x"):
            raise ValueError(f"unknown is {self.unknown!r}; choose 'error' or 'x': each sequence keeps its row")
        loaded = self._loaded()
        self.layers_ = self._layer_numbers(loaded)
        self.n_features_out_ = len(self.layers_) * loaded.config.embed_dim
        return self

    def transform(self, X) -> np.ndarray:
        """(proteins, n_features_out_) float32 for a list, array, Series or one-column frame of sequences.

        Raises:
            TypeError: for what is no sequence of strings. FastaError, a ValueError: for residues, naming the protein.
        """
        check_is_fitted(self)
        sequences = _strings(X)
        settings = self._settings()
        keys = {text: hashlib.sha256(f"{settings} {text}".encode()).digest() for text in sequences}
        rows = KEPT.find(keys.values())
        if self.cache is not None:
            rows |= rows_kept.read(Path(self.cache), [key for key in keys.values() if key not in rows])
        missing = [text for text, key in keys.items() if key not in rows]
        made = dict(zip((keys[text] for text in missing), self._compute(missing, sequences), strict=True))
        if self.cache is not None and made:
            rows_kept.write(Path(self.cache), made)
        rows |= made
        KEPT.keep(rows)
        return np.stack([rows[keys[text]] for text in sequences]) if sequences else self._none()

    def get_feature_names_out(self, input_features=None) -> np.ndarray:
        """Names such as 'layer33_0007', one a column."""
        check_is_fitted(self)
        width = self.n_features_out_ // len(self.layers_)
        names = [f"layer{layer}_{column:04}" for layer in self.layers_ for column in range(width)]
        return np.array(names, dtype=object)

    def _compute(self, missing: list[str], sequences: list[str]) -> Iterable[np.ndarray]:
        if not missing:
            return
        places = {text: place for place, text in reversed(list(enumerate(sequences)))}
        found = embed(
            self._loaded(),
            [(f"X[{places[text]}]", text) for text in missing],  # so that an error names it
            layers=self.layers_,
            pool=self.pool,
            batch_tokens=self.batch_tokens,
            unknown=self.unknown,
            overlength=self.overlength,
        )
        for _, arrays in found:
            yield np.concatenate([arrays[layer] for layer in self.layers_])

    def _none(self) -> np.ndarray:
        return np.zeros((0, self.n_features_out_), np.float32)

    def _layer_numbers(self, loaded) -> list[int]:
        asked = [self.layers] if isinstance(self.layers, int) else list(self.layers)
        numbers = [layer_numbers(loaded, [layer])[0] for layer in asked]
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"layers is {self.layers!r}: give at least one layer, and each once")
        return numbers

    def _loaded(self):
        name = str(self.model)
        return _model(name, _fingerprint(name), self._dtype(), str(self.device), self.backend)

    def _dtype(self) -> str:
        return fastest(str(self.model), self.device)[0] if self.dtype == "auto" else self.dtype

    def _settings(self) -> str:
        """What decides the bits of a row besides the sequence."""
        own = _fingerprint(str(self.model)), self.layers_, self.pool, self._dtype(), self.unknown, self.overlength
        machine = str(self._loaded().device), self.backend, _C.isa(), torch.__version__, __version__
        return digest_of([*own, *machine])

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        return tags


def _strings(X) -> list[str]:
    """The sequences of a list, array, Series or frame of one column. Raises TypeError."""
    if isinstance(X, str | bytes):
        raise TypeError("X is one string; give a list of sequences: [sequence]")
    if getattr(X, "ndim", 1) == 2:
        if X.shape[1] != 1:
            raise TypeError(f"X has {X.shape[1]} columns; give the one that holds the sequences")
        X = X.iloc[:, 0] if hasattr(X, "iloc") else X[:, 0]
    sequences = list(X)
    for row, text in enumerate(sequences):
        if not isinstance(text, str):
            raise TypeError(f"row {row} of X is {text!r}, no protein sequence; leave out or fill in what is missing")
    return [str(text) for text in sequences]


@lru_cache(maxsize=2)
def _model(name: str, _fingerprint: str, dtype: str, device: str, backend: str | None):
    return load(name, device=device, dtype=dtype, backend=backend, packed="auto")[0]


def _fingerprint(name: str) -> str:
    """Of the bytes of a model's files, which may be replaced while a process runs."""
    if name.startswith("random:"):
        return name
    files = weights.files_of(hub.resolve(name))
    stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _digest(stamps)


@lru_cache(maxsize=16)
def _digest(stamps: tuple) -> str:
    return digest_of({name: weights.sha256(Path(name)) for name, *_ in stamps})
