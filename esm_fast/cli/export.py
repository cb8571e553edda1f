"""esm-fast export: a data set in the formats that other tools open."""

import argparse
from pathlib import Path

from .common import InputError, check_space, output_path, progress
from .dataset import SOME_FAILED, require_pyarrow
from .numbers import layer_number

NAME = "export"
ORDER = 14
HELP = "a data set as HDF5, npy or fair-esm's files"
DESCRIPTION = """\
Writes the embeddings of a finished data set in another format:

uniprot-h5          HDF5 as UniProt publishes it, and as esm-fast embed -o OUT.h5 writes it
bio-embeddings-h5   HDF5 as bio_embeddings wrote it: keys are MD5 of the sequence
npy                 one matrix, OUT.npy, and OUT.ids.txt with an id a line
pt                  a folder of fair-esm's .pt files, one a protein"""
EXAMPLES = """\
  esm-fast export uniref50/ --to uniprot-h5 -o per-protein.h5
  esm-fast export uniref50/ --to npy -o uniref50.npy
  esm-fast export uniref50/ --to pt -o files/ --residues
"""
_FORMATS = ("uniprot-h5", "bio-embeddings-h5", "npy", "pt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="the folder of a data set")
    parser.add_argument("--to", required=True, choices=_FORMATS, help="the format")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the file to write; for pt a folder")
    parser.add_argument("--layer", type=layer_number, default=-1, metavar="N", help="default: the last one stored")
    parser.add_argument("--residues", action="store_true", help="every residue's embedding, in place of the pooled one")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")


def run(args: argparse.Namespace) -> int:
    data = finished(args.dataset)
    from ..dataset.export import FORMATS, Ask, ids_of
    from ..dataset.units import has_numbers

    if args.to == "pt":
        out = Path(args.output)
        if out.exists() and (not out.is_dir() or any(out.iterdir())) and not args.force:
            raise InputError(f"{out} exists; give --force to write into it, or another -o")
    else:
        out = output_path(args.output, args.force)
        if args.to == "npy":
            output_path(str(ids_of(out)), args.force)
    layer = layer_of(data, args.layer)
    check_space(out.parent, _size(data, args.residues))
    with progress(len(data), "proteins") as bar:
        FORMATS[args.to](data, out, Ask(layer, args.residues, bar.update))
    missing = sum(not has_numbers(data.status(number)) for number in range(len(data)))
    written = len(data) - missing
    args.summary.say(f"proteins  {written:,} of {len(data):,}", proteins=written, records=len(data), layer=layer)
    args.summary.output(out, format=args.to)
    return SOME_FAILED if missing else 0


def finished(folder: str):
    """The data set, opened. Raises InputError for one that run.json does not call complete."""
    require_pyarrow()
    from ..dataset.layout import RUN
    from ..dataset.reader import open

    data = open(folder)
    if not (data.folder / RUN).exists():
        raise InputError(f"{data.folder} is not finished; see what it lacks with: esm-fast finish {data.folder}")
    return data


def layer_of(data, layer: int) -> int:
    number = data.layers[-1] if layer == -1 else layer
    if number not in data.layers:
        raise InputError(f"layer {layer} is not stored; there are {' '.join(map(str, data.layers))}")
    return number


def _size(data, residues: bool) -> int:
    """About the bytes of the output, without what a format adds."""
    settings, info = data.plan.settings, data.plan.info
    rows = info["residues"] if residues else len(data)
    return rows * settings.width * (4 if settings.store == "float32" else 2)
