"""Contact maps as pictures; needs matplotlib (the extra `plot`)."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files.atomic import atomic


def write_map(path: Path, contacts: np.ndarray, title: str) -> None:
    """contacts: (residues, residues) probabilities."""
    figure = Figure(figsize=(5.6, 5), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.12, 0.1, 0.72, 0.8064))  # square, whatever the labels
    end = len(contacts) + 0.5
    image = axes.imshow(contacts, cmap="Greys", vmin=0, vmax=1, extent=(0.5, end, end, 0.5), interpolation="nearest")
    axes.set(xlabel="residue", ylabel="residue")
    axes.set_title(title if len(title) <= 60 else title[:59] + "…", fontsize=9, parse_math=False)
    figure.colorbar(image, cax=figure.add_axes((0.86, 0.1, 0.025, 0.8064)), label="contact probability")
    with atomic(path, durable=False, tidy=False) as temporary:
        figure.savefig(temporary, format="png")
