"""Proteins as points: in a picture, or in a page that shows the id under the pointer."""

import json
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from .colors import Colors

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>$title</title>
<style>
  body { margin: 0; font: 14px sans-serif; display: flex; height: 100vh; overflow: hidden }
  main { flex: 1; display: flex; flex-direction: column; min-width: 0; padding: 8px }
  h1 { font-size: 16px; margin: 0 0 4px } p { margin: 4px 0; color: #555 }
  #chart { flex: 1; min-height: 0; border: 1px solid #ccc } canvas { display: block }
  aside { width: 220px; padding: 12px; overflow: auto; overflow-wrap: anywhere }
  i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 6px }
  output { display: block; min-height: 3em; font-weight: bold }
</style>
<main>
  <h1>$title</h1>
  <div id="chart"><canvas></canvas></div>
  <p>across: $x_axis; up: $y_axis. Wheel: nearer or farther. Drag: move. Double click: all.</p>
</main>
<aside><output></output>$legend</aside>
<script>
const {points, ids, colors} = $data;
const box = document.getElementById("chart"), canvas = box.firstChild, shown = document.querySelector("output");
const pen = canvas.getContext("2d"), radius = points.length > 5000 ? 1.5 : 3, margin = 20;
const low = [Infinity, Infinity], high = [-Infinity, -Infinity];
for (const p of points) for (const k of [0, 1]) {
  low[k] = Math.min(low[k], p[k]); high[k] = Math.max(high[k], p[k]);
}
let view = {scale: 1, x: 0, y: 0}, at = null;
const place = p => {
  const across = (p[0] - low[0]) / (high[0] - low[0] || 1), down = (high[1] - p[1]) / (high[1] - low[1] || 1);
  return [view.x + view.scale * (margin + across * (canvas.width - 2 * margin)),
          view.y + view.scale * (margin + down * (canvas.height - 2 * margin))];
};
function draw() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  points.forEach((p, i) => {
    const [x, y] = place(p);
    pen.fillStyle = colors[i]; pen.beginPath(); pen.arc(x, y, radius, 0, 7); pen.fill();
  });
}
function fit() { canvas.width = box.clientWidth; canvas.height = box.clientHeight; draw(); }
canvas.onmousemove = event => {
  if (at) {
    view.x += event.offsetX - at[0]; view.y += event.offsetY - at[1];
    at = [event.offsetX, event.offsetY]; draw();
  }
  let best = 10, found = [];  // pixels
  points.forEach((p, i) => {
    const [x, y] = place(p), far = Math.hypot(x - event.offsetX, y - event.offsetY);
    if (far < best) { best = far; found = [i]; } else if (far === best && found.length) found.push(i);
  });
  shown.textContent = found.slice(0, 10).map(i => ids[i]).join(", ") + (found.length > 10 ? " ..." : "");
};
canvas.onmousedown = event => { at = [event.offsetX, event.offsetY]; };
window.onmouseup = () => { at = null; };
canvas.onwheel = event => {
  event.preventDefault();
  const by = Math.exp(-event.deltaY / 500);
  view = {scale: view.scale * by, x: event.offsetX + by * (view.x - event.offsetX),
          y: event.offsetY + by * (view.y - event.offsetY)};
  draw();
};
canvas.ondblclick = () => { view = {scale: 1, x: 0, y: 0}; draw(); };
window.onresize = fit;
fit();
</script>
""")


class Scatter(NamedTuple):
    points: np.ndarray  # (proteins, 2), finite
    ids: list[str]
    colors: Colors
    axes: tuple[str, str]
    title: str


def png(scatter: Scatter, path: Path) -> None:
    """Needs matplotlib (the extra `plot`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 6.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=scatter.axes[0], ylabel=scatter.axes[1])
    figure.suptitle(scatter.title, parse_math=False)
    size = float(np.clip(20_000 / len(scatter.points), 1, 30))  # many points are small ones
    axes.scatter(*scatter.points.T, c=scatter.colors.points, s=size, alpha=0.8, linewidths=0)
    if scatter.colors.legend:
        handles = [Line2D([], [], color=color, marker="o", linestyle="") for _, color in scatter.colors.legend]
        legend = figure.legend(handles, [""] * len(handles), loc="outside right center", frameon=False)
        for text, (label, _) in zip(legend.get_texts(), scatter.colors.legend, strict=True):
            text.set_parse_math(False)  # a value may hold $
            text.set_text(label)
    figure.savefig(path, format="png")


def html(scatter: Scatter, path: Path) -> None:
    """One file, which opens without a network."""
    data = {
        "points": [[float(f"{number:.6g}") for number in point] for point in scatter.points.tolist()],
        "ids": scatter.ids,
        "colors": scatter.colors.points,
    }
    page = _PAGE.substitute(
        title=escape(scatter.title),
        x_axis=escape(scatter.axes[0]),
        y_axis=escape(scatter.axes[1]),
        legend="".join(
            f'<div><i style="background: {color}"></i>{escape(text)}</div>' for text, color in scatter.colors.legend
        ),
        data=json.dumps(data).replace("<", "\\u003c"),  # an id may hold </script>
    )
    path.write_text(page, encoding="utf-8")


WRITERS = {".png": png, ".html": html}
