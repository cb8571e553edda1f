"""esm-fast variants without --variants: every substitution of the proteins, as a table, a matrix or a picture."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from ..files.atomic import atomic
from .common import InputError


def write_scans(args: argparse.Namespace, out: Path, scans, models, count: int) -> int:
    """scans: (name, protein, a scan a column). Returns the rows written."""
    from ..variants.formats import FORMS
    from ..variants.tables import writer

    ending = args.output.lower()
    if args.png or ending.endswith(".png"):
        require_matplotlib()
    if ending.endswith((".png", ".html")):
        return _draw_one(args, out, scans, models, count)
    if args.format == "matrix":
        return _matrix(args, out, scans, models, count)
    form = FORMS[args.format or ("alphamissense" if ".tsv" in ending[-7:] else "long")]
    scores = score_columns(form.score, models)
    rows = 0
    with atomic(out) as temporary, writer(temporary, ending, [*form.columns, *scores], set(scores)) as add:
        for name, protein, columns in scans:
            for cells, (at, column) in form.rows(name, protein):
                add([*cells, *(float(scan[at, column]) for scan in columns)])
                rows += 1
            if args.png:
                _draw(Path(f"{out}.maps") / f"{_file_name(name)}.png", name, protein, columns[-1], args, models)
    return rows


def score_columns(own: str, models) -> list[str]:
    """One model's score has the form's own name; of several, each has its model's, and the combination that."""
    if len(models.names) == 1:
        return [own]
    return [*models.names, *([f"{own}_{models.combined}"] if models.combined else [])]


def _only(args: argparse.Namespace, scans, models, count: int):
    if count > 1:
        raise InputError(
            f"{args.output} is for one protein, and the FASTA has {count}; give a table, with --png for maps"
        )
    name, protein, columns = next(iter(scans))
    if len(models.names) > 1 and models.combined is None:
        raise InputError("--combine none gives several scores; one is needed here: mean or min")
    return name, protein, columns[-1]


def _matrix(args: argparse.Namespace, out: Path, scans, models, count: int) -> int:
    from ..variants.formats import matrix_rows
    from ..variants.tables import writer

    _, protein, scan = _only(args, scans, models, count)
    header, rows = matrix_rows(protein, scan)
    with atomic(out) as temporary, writer(temporary, args.output.lower(), header, set(header[1:])) as add:
        for row in rows:
            add(row)
    return 19 * len(protein)


def _draw_one(args: argparse.Namespace, out: Path, scans, models, count: int) -> int:
    name, protein, scan = _only(args, scans, models, count)
    _draw(out, name, protein, scan, args, models)
    return 19 * len(protein)


def _draw(path: Path, name: str, protein: str, scan, args: argparse.Namespace, models) -> None:
    from ..plots.heat_map import HeatMap

    path.parent.mkdir(exist_ok=True)
    by = f"{args.strategy[0]}, {models.said}"
    HeatMap(name, protein, scan, by).write(path)


def _file_name(name: str) -> str:
    from ..sequences.names import file_name

    return file_name(name)


def require_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise InputError("a picture needs matplotlib: pip install 'esm_fast[plot]'; -o OUT.html does not")
