"""Heat maps of all substitutions of a protein: a picture, or a page that shows variant and score under the pointer."""

import json
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files.atomic import atomic
from .heat_map_page import PAGE

COLUMNS = "ACDEFGHIKLMNPQRSTVWY"  # of a scan
ORDER = "KRHEDNQTSCGAVLIMPYFW"  # of the map's rows: residues that are alike stand together
# From worse to better than the wild type, by way of white: orange and purple differ for every kind of colour vision.
STOPS = ((127, 59, 8), (224, 130, 20), (253, 224, 182), (247, 247, 247), (216, 218, 235), (128, 115, 172), (45, 0, 75))
_PER_LINE = 100  # residues, in the picture


class HeatMap(NamedTuple):
    """scan: (residues, 20) scores, less the wild type's; by: what made it, for the title."""

    name: str
    protein: str
    scan: np.ndarray
    by: str

    @property
    def limit(self) -> float:
        """The score that has the strongest colour; a hundredth of all are beyond it."""
        return max(float(np.quantile(np.abs(self.scan[np.isfinite(self.scan)]), 0.99)), 1e-6)

    @property
    def means(self) -> np.ndarray:
        """Of the 19 substitutions of each residue; the wild type adds 0."""
        return self.scan.sum(axis=1) / 19

    def write(self, path: Path) -> None:
        """As a page if the path ends in .html, else as a picture; for that matplotlib is needed (the extra `plot`)."""
        with atomic(path, durable=False) as temporary:
            (self.write_page if path.suffix.lower() == ".html" else self.write_picture)(temporary)

    def rows(self) -> np.ndarray:
        """(20, residues) in ORDER."""
        return self.scan[:, [COLUMNS.index(residue) for residue in ORDER]].T

    def write_page(self, path: Path) -> None:
        path.write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """One page, which opens without a network."""
        data = {
            "protein": self.protein,
            "order": ORDER,
            "scores": [[float(f"{score:.4g}") for score in row] for row in self.rows().tolist()],
            "means": [float(f"{mean:.4g}") for mean in self.means.tolist()],
            "limit": self.limit,
            "stops": STOPS,
        }
        return PAGE.substitute(
            title=escape(self.name),
            by=escape(self.by),
            residues=f"{len(self.protein):,}",
            data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        )

    def write_picture(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure

        lines = -(-len(self.protein) // _PER_LINE)
        colors = LinearSegmentedColormap.from_list("scores", [tuple(c / 255 for c in stop) for stop in STOPS])
        height = 0.5 + 3.1 * lines
        figure = Figure(figsize=(14, height), dpi=110 if lines < 20 else 60)
        FigureCanvasAgg(figure)
        figure.suptitle(_short(f"{self.name}: {self.by}"), parse_math=False, fontsize=11, y=1 - 0.12 / height)
        image, rows = None, self.rows()
        for line in range(lines):
            image = self._line(figure, line, lines, rows, colors)
        bar = figure.colorbar(image, cax=figure.add_axes((0.93, 1 - 2.9 / height, 0.01, 2.1 / height)), extend="both")
        bar.set_label("score (wild type: 0)", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        figure.savefig(path, format="png")

    def _line(self, figure, line: int, lines: int, rows: np.ndarray, colors):
        """The map of some residues and, above it, their means."""
        height, start = 3.1 * lines + 0.5, line * _PER_LINE
        part = self.protein[start : start + _PER_LINE]
        bottom, width = (3.1 * (lines - line) - 2.75) / height, 0.88 * len(part) / _PER_LINE
        axes = figure.add_axes((0.04, bottom, width, 2.1 / height))
        extent = (start + 0.5, start + len(part) + 0.5, 19.5, -0.5)
        options = dict(cmap=colors, vmin=-self.limit, vmax=self.limit, aspect="auto", interpolation="nearest")
        image = axes.imshow(rows[:, start : start + len(part)], extent=extent, **options)
        own = [ORDER.find(residue) for residue in part]
        known = [i for i, row in enumerate(own) if row >= 0]
        axes.plot([start + i + 1 for i in known], [own[i] for i in known], ".", color="black", markersize=2)
        axes.set_yticks(range(20), ORDER, fontsize=6)
        ticks = [n for n in range(start + 1, start + len(part) + 1) if n % 10 == 0 or n == start + 1]
        axes.set_xticks(ticks, [f"{self.protein[n - 1]}{n}" for n in ticks], fontsize=7)
        track = figure.add_axes((0.04, bottom + 2.15 / height, width, 0.35 / height), sharex=axes)
        track.bar(
            range(start + 1, start + len(part) + 1), self.means[start : start + len(part)], width=1, color="#555555"
        )
        track.set_ylim(min(float(self.means.min()), 0), max(float(self.means.max()), 0) or 1)
        track.tick_params(labelbottom=False, labelsize=6)
        track.set_ylabel("mean", fontsize=6)
        return image


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:119] + "…"
