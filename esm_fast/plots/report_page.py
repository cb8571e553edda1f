"""The page of `esm-fast report`: all that was computed of a few proteins, in one file that loads nothing."""

import base64
from html import escape
from string import Template
from typing import NamedTuple

import numpy as np

from .heat_map import HeatMap

PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>$title</title>
<style>
  body { margin: 0 auto; max-width: 1100px; padding: 8px 12px; font: 14px sans-serif; color: #222 }
  h1, h2 { font-size: 18px; margin: 24px 0 6px; overflow-wrap: anywhere } h3 { font-size: 14px; margin: 16px 0 4px }
  p { margin: 2px 0 6px; color: #555; overflow-wrap: anywhere } nav { overflow-wrap: anywhere }
  .sequence { font-family: monospace; color: #222 } iframe { width: 100%; height: 430px; border: 1px solid #ccc }
  .map { width: 100%; max-width: 440px; image-rendering: pixelated; border: 1px solid #ccc }
  svg { width: 100%; height: 130px; background: #fafafa } .wide { overflow-x: auto }
  table { border-collapse: collapse } td, th { padding: 2px 10px 2px 0; text-align: left; overflow-wrap: anywhere }
  td.number { text-align: right; font-variant-numeric: tabular-nums }
</style>
<h1>$title</h1>
<p>$by</p>
<nav>$links</nav>
$sections
<script>
for (const canvas of document.querySelectorAll("canvas.map")) {
  const bytes = atob(canvas.dataset.values), pen = canvas.getContext("2d");
  const image = pen.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < bytes.length; i++) {
    const shade = 255 - bytes.charCodeAt(i);
    image.data.set([shade, shade, shade, 255], 4 * i);
  }
  pen.putImageData(image, 0, 0);
  canvas.dataset.drawn = bytes.length;
}
</script>
""")


class Findings(NamedTuple):
    """Of one protein. entropy: (residues,) bits; contacts: (residues, residues) or why there are none; neighbours:
    (id, cosine), or None where no data set was given; perplexity: None unless each residue was masked."""

    heat_map: HeatMap
    perplexity: float | None
    entropy: np.ndarray
    contacts: np.ndarray | str
    neighbours: list[tuple[str, float]] | None


def page(found: list[Findings], title: str, by: str, worth: str) -> str:
    """worth: what is known of the contacts."""
    links = " ".join(f'<a href="#p{n}">{escape(each.heat_map.name)}</a>' for n, each in enumerate(found))
    sections = "\n".join(_section(n, each, worth) for n, each in enumerate(found))
    return PAGE.substitute(title=escape(title), by=escape(by), links=links, sections=sections)


def top(heat_map: HeatMap, count: int = 12) -> list[tuple[str, float]]:
    """The substitutions that the model finds the most likely, beside the wild type: ("M182T", score)."""
    from .heat_map import COLUMNS

    scores = heat_map.scan.astype(float).copy()
    for at, own in enumerate(heat_map.protein):
        if own in COLUMNS:
            scores[at, COLUMNS.index(own)] = -np.inf
    order = np.argsort(-scores, axis=None, kind="stable")[:count]
    places = (divmod(int(place), len(COLUMNS)) for place in order)
    return [(f"{heat_map.protein[at]}{at + 1}{COLUMNS[new]}", float(scores[at, new])) for at, new in places]


def _section(number: int, found: Findings, worth: str) -> str:
    heat_map, name = found.heat_map, escape(found.heat_map.name)
    perplexity = "" if found.perplexity is None else f", pseudo-perplexity {found.perplexity:.2f}"
    parts = [
        f'<section id="p{number}"><h2>{name}</h2>',
        f"<p>{len(heat_map.protein):,} residues{perplexity}, mean entropy {found.entropy.mean():.2f} bits</p>",
        f'<p class="sequence">{escape(heat_map.protein)}</p>',
        f"<h3>Every substitution</h3><p>{escape(heat_map.by)}</p>",
        f'<iframe title="every substitution of {name}" srcdoc="{escape(heat_map.page())}"></iframe>',
        "<h3>The most likely substitutions</h3>",
        _table(("substitution", "score"), top(heat_map), "{:+.3f}"),
        "<h3>Entropy of each residue</h3><p>Bits, of the 20 residues; low where the model is sure.</p>",
        _entropy(found.entropy),
        "<h3>Contacts</h3>",
        _contacts(found.contacts, worth),
    ]
    if found.neighbours is not None:
        parts += ["<h3>Nearest neighbours</h3>", _table(("id", "cosine"), found.neighbours, "{:.4f}")]
    return "\n".join([*parts, "</section>"])


def _table(heads: tuple, rows: list[tuple[str, float]], form: str) -> str:
    lines = [f'<tr><td>{escape(name)}</td><td class="number">{form.format(value)}</td></tr>' for name, value in rows]
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _entropy(entropy: np.ndarray) -> str:
    """A bar a residue; the height is log2(20), the most that it can be."""
    most = np.log2(20)
    bars = "".join(
        f'<rect x="{at}" y="{most - bits:.3f}" width="0.9" height="{max(bits, 0):.3f}"><title>{at + 1}: {bits:.2f}'
        "</title></rect>"
        for at, bits in enumerate(entropy.tolist())
    )
    return (
        f'<svg class="entropy" viewBox="0 0 {len(entropy)} {most:.3f}" preserveAspectRatio="none" fill="#3b6ea5">{bars}'
        f"</svg><p>residues 1 to {len(entropy):,}; the top is {most:.2f} bits</p>"
    )


def _contacts(contacts: np.ndarray | str, worth: str) -> str:
    if isinstance(contacts, str):
        return f"<p>{escape(contacts)}</p>"
    size, shades = len(contacts), np.clip(contacts * 255, 0, 255).round().astype(np.uint8)
    values = base64.b64encode(shades.tobytes()).decode("ascii")
    far = np.argwhere(np.triu(contacts, 6) > 0.5)
    return (
        f"<p>{escape(worth)} {len(far):,} pairs of residues 6 or more apart have more than 0.5. Black: 1.</p>"
        f'<canvas class="map" width="{size}" height="{size}" data-values="{values}"></canvas>'
    )
