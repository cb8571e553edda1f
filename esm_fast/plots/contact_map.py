"""Contact maps as pictures; needs matplotlib (the extra `plot`)."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files.atomic import atomic


def write_map(path: Path, contacts: np.ndarray, title: str, sequence: str = "", true: np.ndarray | None = None) -> None:
    """contacts: (residues, residues) probabilities; true: what a structure says, drawn beside, NaN in blue."""
    width = 5.6 if true is None else 10.7
    figure = Figure(figsize=(width, 5), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.68 / width, 0.1, 4.032 / width, 0.8064))  # square, whatever the labels
    image = _panel(axes, contacts, sequence)
    axes.set_title(_short(title, 60), fontsize=9, parse_math=False)
    bar = figure.add_axes((4.82 / width, 0.1, 0.14 / width, 0.8064))
    figure.colorbar(image, cax=bar, label="contact probability")
    if true is not None:
        beside = figure.add_axes((6.5 / width, 0.1, 4.032 / width, 0.8064))
        _panel(beside, true, sequence)
        beside.set_title("in the structure (blue: not seen)", fontsize=9)
    with atomic(path, durable=False, tidy=False) as temporary:
        figure.savefig(temporary, format="png")


def _panel(axes, values: np.ndarray, sequence: str):
    end, colors = len(values) + 0.5, colormaps["Greys"].with_extremes(bad="#c6dbef")
    extent = (0.5, end, end, 0.5)
    image = axes.imshow(values, cmap=colors, vmin=0, vmax=1, extent=extent, interpolation="nearest")
    axes.set(xlabel="residue", ylabel="residue")
    marks = ruler(len(values))
    labels = [f"{sequence[mark - 1 : mark]}{mark}" for mark in marks]
    axes.set_xticks(marks, labels, fontsize=7)
    axes.set_yticks(marks, labels, fontsize=7)
    return image


def ruler(length: int) -> list[int]:
    """The residues that are marked: the first, and round numbers, at most a dozen."""
    step = next(step for k in range(12) for step in (5 * 10**k, 10 * 10**k, 20 * 10**k) if length <= 11 * step)
    return [1, *range(step, length + 1, step)][: length or 1]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
