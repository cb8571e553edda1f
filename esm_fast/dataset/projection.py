"""Embeddings in two dimensions: the principal components, or UMAP where it is installed."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .reader import Dataset


class Projection(NamedTuple):
    points: np.ndarray  # float64 (proteins, 2), in the order of the input; NaN for proteins without numbers
    axes: tuple[str, str]


def pca(data: Dataset, layer: int = -1, on_rows: Callable[[int], None] = lambda count: None) -> Projection:
    """The two directions of the largest variance, a shard at a time; each distinct sequence counts once.

    The sign of a direction is free: here its largest weight is positive, so that the same data give the same picture.
    """
    width = data.plan.settings.width
    count, total, products = 0, np.zeros(width), np.zeros((width, width))
    shift = None  # near the mean, or the products of large numbers would leave nothing of small differences
    for rows in _blocks(data, layer, on_rows):
        rows = rows[~np.isnan(rows).any(axis=1)]
        if shift is None and len(rows):
            shift = rows.mean(axis=0)
        if len(rows):
            rows = rows - shift
            count, total, products = count + len(rows), total + rows.sum(axis=0), products + rows.T @ rows
    if not count:
        raise ValueError(f"{data.folder} has no protein with an embedding")
    covariance = products / count - np.outer(total, total) / count**2
    variances, directions = np.linalg.eigh(covariance)
    directions = directions[:, [-1, -2]]
    directions *= np.sign(directions[np.abs(directions).argmax(axis=0), [0, 1]])
    center = shift + total / count
    points = np.concatenate([(rows - center) @ directions for rows in _blocks(data, layer, on_rows)])
    share = variances[[-1, -2]] / max(variances.sum(), np.finfo(float).tiny)
    return Projection(points[data.rows], tuple(f"component {i + 1} ({share[i]:.0%} of the variance)" for i in (0, 1)))


def umap(data: Dataset, layer: int = -1, on_rows: Callable[[int], None] = lambda count: None) -> Projection:
    """By cosine, with UMAP's own defaults and a fixed seed; its epochs have its own bar. Raises ImportError without
    umap-learn."""
    from umap import UMAP

    rows = np.concatenate([*_blocks(data, layer, on_rows)])
    there = ~np.isnan(rows).any(axis=1)
    if there.sum() < 4:
        raise ValueError(f"{data.folder} has {there.sum()} distinct sequences with an embedding; UMAP needs 4 or more")
    points = np.full((len(rows), 2), np.nan)
    neighbours = min(15, int(there.sum()) - 1)
    bars = {"disable": sys.stderr is None, "delay": 1}
    method = UMAP(n_neighbors=neighbours, metric="cosine", random_state=0, n_jobs=1, tqdm_kwds=bars)
    points[there] = method.fit_transform(rows[there])
    return Projection(points[data.rows], ("UMAP 1", "UMAP 2"))


METHODS = {"pca": pca, "umap": umap}
PASSES = {"pca": 2, "umap": 1}  # over all rows


def _blocks(data: Dataset, layer: int, on_rows: Callable[[int], None]):
    for _, rows in data.blocks(layer):
        yield rows.astype(np.float64)
        on_rows(len(rows))
