"""esm-fast contacts: the probabilities that residues touch, as npz and as pictures."""

import argparse
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ..files.atomic import atomic, remove_leftovers
from .common import (
    InputError,
    add_batch_tokens,
    add_model,
    add_policies,
    check_space,
    dtype_of,
    ingest_of,
    load_model,
    output_path,
    progress,
    require_contacts,
    result_lines,
)

NAME = "contacts"
ORDER = 22
HELP = "contact maps of a FASTA file, as npz and PNG"
DESCRIPTION = """\
Predicts which residues of each protein touch (C-beta atoms within 8 Angstrom): a float32 array of
probabilities, residues x residues, under the protein's accession; all in one file if -o ends in
.npz, else one file each in a folder."""
EXAMPLES = """\
  esm-fast contacts proteins.fasta -o contacts.npz --model esm1b_t33_650M_UR50S
  esm-fast contacts proteins.fasta -o maps --png --overlength truncate

Open it in Python:
  import numpy
  contacts = numpy.load("contacts.npz")["P12345"]
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fasta", nargs="+", metavar="FASTA", help="FASTA files, or - for standard input")
    parser.add_argument("-o", "--output", required=True, metavar="DIR|FILE.npz", help="where to write")
    parser.add_argument("--force", action="store_true", help="overwrite files")
    parser.add_argument(
        "--png", action="store_true", help="also draw each map: in DIR, or in the folder FILE (needs matplotlib)"
    )
    add_batch_tokens(parser)
    add_model(parser)
    add_policies(parser, overlength=("error", "truncate"))


def run(args: argparse.Namespace) -> None:
    if args.png:
        _require_matplotlib()
    single = args.output.endswith(".npz")
    out = output_path(args.output, args.force) if single else _output_folder(args.output, args.force)
    dtype = dtype_of(args)
    model = load_model(args.model, device=args.device, dtype=dtype, backend=args.backend, threads=args.threads)
    require_contacts(model, args.model)

    from ..inference.embed import token_budget
    from ..inference.outputs import make
    from ..inference.stream import run as run_model
    from ..sequences.ingest import Counts, Source
    from ..sequences.names import file_name

    budget = token_budget(model, args.batch_tokens)
    with Source(args.fasta, ingest_of(args, model.config.limit(args.overlength), safe=file_name)) as source:
        expected, counts, start = source.scan(), Counts(), time.perf_counter()
        check_space(out.parent, 4 * expected.squares)
        with (_archive if single else _folder)(out) as add, progress(expected.residues) as bar:
            for protein in run_model(model, source.tokens(counts), [make("contacts")], budget, bar.update):
                name, contacts = protein.label.name, protein.arrays[0]
                add(name, contacts)
                if args.png:
                    _draw(out.with_suffix("") if single else out, name, contacts, str(protein.label))
            if counts != expected:
                raise InputError("the input changed while it was read; start again")
    print("\n".join(result_lines(counts, time.perf_counter() - start, args.model)))
    print(f"output    {out}")


def _require_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise InputError("--png needs matplotlib; install it: pip install matplotlib")


def _output_folder(text: str, force: bool) -> Path:
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder, or a name that ends in .npz")
    if not force and any(folder.glob("*.npz")):
        raise InputError(f"{folder} holds .npz files; give --force to overwrite them, or another -o")
    return folder


@contextmanager
def _archive(path: Path, tidy: bool = True):
    """add(name, contacts) for one file of all proteins."""
    from ..files.npz import NpzWriter

    with atomic(path, tidy=tidy) as temporary, NpzWriter(temporary) as archive:
        yield archive.add


@contextmanager
def _folder(folder: Path):
    """add(name, contacts) for a file a protein."""

    def add(name, contacts):
        with _archive(folder / f"{name}.npz", tidy=False) as add_to_archive:
            add_to_archive(name, contacts)

    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    yield add


def _draw(folder: Path, name: str, contacts, title: str) -> None:
    from ..plots.contact_map import write_map

    folder.mkdir(exist_ok=True)
    write_map(folder / f"{name}.png", contacts, title)
