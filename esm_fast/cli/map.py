"""esm-fast map: the proteins of a data set as points in two dimensions."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from ..sequences.table import read_table
from .common import InputError, output_path, progress
from .dataset import SOME_FAILED
from .export import finished, layer_of
from .numbers import layer_number

NAME = "map"
ORDER = 16
HELP = "a data set as a map: a picture, or a page with ids"
DESCRIPTION = """\
Draws each protein of a finished data set as a point, by the two principal components of the
embeddings, or by UMAP.

OUT.png    a picture (needs matplotlib)
OUT.html   a page of its own, without network: the id is shown under the pointer

Colours come from a column of a table with tabs, whose first line has the columns' names and whose
first column has the ids, such as UniProt downloads."""
EXAMPLES = """\
  esm-fast map proteome/ -o map.png
  esm-fast map proteome/ -o map.html --table uniprot.tsv --column 'Protein families' --method umap
"""
_SUFFIXES = (".png", ".html")
_NEEDS = {
    "umap": ("umap", "--method umap needs umap-learn: pip install 'esm_fast[umap]'"),
    ".png": ("matplotlib", "a picture needs matplotlib: pip install 'esm_fast[plot]'; -o OUT.html does not"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="the folder of a data set")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="OUT.png or OUT.html")
    parser.add_argument("--method", default="pca", choices=("pca", "umap"), help="default: %(default)s")
    parser.add_argument("--table", metavar="TSV", help="what to colour by, with the ids in the first column")
    parser.add_argument("--column", metavar="NAME", help="of the table (default: its second)")
    parser.add_argument("--layer", type=layer_number, default=-1, metavar="N", help="default: the last one stored")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")


def run(args: argparse.Namespace) -> int:
    out = output_path(args.output, args.force)
    suffix = out.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(f"{out} is neither a .png nor a .html")
    if args.column and not args.table:
        raise InputError("--column names a column of a table; give --table FILE.tsv")
    for need in (args.method, suffix):
        if need in _NEEDS and find_spec(_NEEDS[need][0]) is None:
            raise InputError(_NEEDS[need][1])
    data = finished(args.dataset)

    import numpy as np

    from ..dataset.projection import METHODS, PASSES
    from ..files.atomic import atomic
    from ..plots.colors import colors_of
    from ..plots.scatter import WRITERS, Scatter

    layer = layer_of(data, args.layer)
    column, values = _values(Path(args.table), args.column, data.ids) if args.table else ("", None)
    with progress(PASSES[args.method] * data.plan.info["sequences"], "sequences", delay=1) as bar:
        points, axes = METHODS[args.method](data, layer, bar.update)
    shown = np.flatnonzero(np.isfinite(points).all(axis=1)).tolist()
    colors = colors_of([values[i] for i in shown] if values else None, len(shown))
    title = f"{len(shown):,} proteins of {data.folder.absolute().name}, layer {layer}"
    if values:
        title += f", coloured by {column}"
    if "warning" in data.plan.info:
        title += f" ({data.plan.info['warning']})"
    with atomic(out) as temporary:
        WRITERS[suffix](Scatter(points[shown], [data.ids[i] for i in shown], colors, axes, title), temporary)
    args.summary.say(f"proteins  {len(shown):,} of {len(data):,}", proteins=len(shown), records=len(data), layer=layer)
    if values:
        coloured = sum(values[i] != "" for i in shown)
        args.summary.say(f"coloured  {coloured:,} with a value in {args.table}", coloured=coloured)
    args.summary.output(out, method=args.method)
    return SOME_FAILED if len(shown) < len(data) else 0


def _values(path: Path, column: str | None, ids: list[str]) -> tuple[str, list[str]]:
    """The column's name, and its value for each id; empty where the table has none."""
    names, rows = read_table(path, separator="\t", quotes=False)
    if len(names) < 2:
        raise InputError(f"{path}: line 1 names {len(names)} columns with tabs between; give an id and a value")
    if column is not None and column not in names:
        raise InputError(f"{path} has no column {column!r}; there are {', '.join(map(repr, names))}")
    at = names.index(column) if column is not None else 1
    found: dict[str, str] = {}
    for row in rows:
        value = row.values[names[at]].strip()
        if found.setdefault(name := row.values[names[0]], value) != value:
            raise InputError(f"{path}: line {row.line}: {name!r} was there before, with another {names[at]!r}")
    if ids and not any(name in found for name in ids):
        raise InputError(f"{path}: its column {names[0]!r} holds none of the data set's ids, such as {ids[0]!r}")
    return names[at], [found.get(name, "") for name in ids]
