"""esm-fast contacts: the probabilities that residues touch, as npz and as pictures."""

import argparse
import time
from collections import deque
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
    is_random,
    load_model,
    output_path,
    progress,
    require_contacts,
    tell_result,
)

NAME = "contacts"
ORDER = 22
HELP = "contact maps of a FASTA file, as npz and PNG"
DESCRIPTION = """\
Predicts which residues of each protein touch (C-beta atoms within 8 Angstrom): a float32 array of
probabilities, residues x residues, under the protein's accession; all in one file if -o ends in
.npz, else one file each in a folder. The summary says what the model's regression was worth on
structures that it was not fitted to, where that is known; esm-fast fit-contacts fits one to any model."""
EXAMPLES = """\
  esm-fast contacts proteins.fasta -o contacts.npz --model esm1b_t33_650M_UR50S
  esm-fast contacts proteins.fasta -o maps --png --overlength truncate
  esm-fast contacts 1abc.fasta -o maps --png --structure 1abc.cif

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
    parser.add_argument("--regression", metavar="FILE", help="of esm-fast fit-contacts (default: the model's own)")
    parser.add_argument(
        "--structure",
        nargs="+",
        default=[],
        metavar="FILE",
        help="PDB or mmCIF files: prints what the maps of their chains are worth, and draws the true contacts beside",
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
    options = dict(device=args.device, backend=args.backend, threads=args.threads, regression=args.regression)
    model = load_model(args.model, dtype=dtype, **options)
    require_contacts(model, args.model)
    truths = _Truths(args.structure, model)

    from ..inference.embed import token_budget
    from ..inference.outputs import make
    from ..inference.stream import run as run_model
    from ..sequences.ingest import Counts, Source
    from ..sequences.names import file_name

    budget = token_budget(model, args.batch_tokens)
    with Source(args.fasta, ingest_of(args, model.config.limit(args.overlength), safe=file_name)) as source:
        expected, counts, start = source.scan(), Counts(), time.perf_counter()
        waiting: deque = deque()  # the residues of proteins that are being computed, in their order
        check_space(out.parent, 4 * expected.squares)
        with (_archive if single else _folder)(out) as add, progress(expected.residues) as bar:
            tokens, with_letters = source.tokens(counts), args.png or truths.chains
            if with_letters:
                tokens = _noted(tokens, waiting)
            for protein in run_model(model, tokens, [make("contacts")], budget, bar.update):
                name, contacts = protein.label.name, protein.arrays[0]
                add(name, contacts)
                if not with_letters:
                    continue
                chain = truths.of(sequence := waiting.popleft(), name, contacts)
                if args.png:
                    folder = out.with_suffix("") if single else out
                    _draw(folder, name, contacts, str(protein.label), sequence, chain)
            if counts != expected:
                raise InputError("the input changed while it was read; start again")
    tell_result(args, counts, time.perf_counter() - start, args.model, dtype)
    worth, found = worth_of(args), {name: {"chain": chain, "precision": each} for name, chain, each in truths.found}
    args.summary.say(*worth_lines(worth), *truths.lines(), worth=worth, structures=found)
    args.summary.output(out)


def worth_of(args: argparse.Namespace) -> dict:
    """What is known of the regression in use."""
    from .. import hub, weights

    if is_random(args.model):
        return {}
    file = args.regression or weights.beside(hub.resolve(args.model))
    return weights.worth_of(Path(file)) if file else {}


def worth_lines(worth: dict) -> list[str]:
    if not worth:
        return []
    far = worth["precision"]["long"]
    return [
        f"worth     of the L most probable contacts of residues 24 or more apart {far['L']:.0%} were true, of the L/5 "
        f"{far['L/5']:.0%}, of any pairs {far['any']:.0%}: {worth['held_out']} chains it was not fitted to"
    ]


class _Truths:
    """The chains of --structure, by their sequence, and what the maps of those proteins are worth."""

    def __init__(self, paths: list[str], model):
        from .fit_contacts import chains_of, require_extra

        if paths:
            require_extra()
        self.chains = {chain.sequence: chain for chain in chains_of(paths, model)} if paths else {}
        self.found: list[tuple[str, str, dict]] = []

    def of(self, sequence: str, name: str, contacts):
        if (chain := self.chains.get(sequence) or self._with_gaps(sequence)) is not None:
            from ..contacts import precisions

            self.found.append((name, chain.name, precisions(contacts, chain)))
        return chain

    def _with_gaps(self, sequence: str):
        """The chain that is this sequence but for the residues that nobody saw or knows, X."""
        for chain in self.chains.values():
            if len(chain.sequence) == len(sequence) and all(
                ours in (theirs, "X") for ours, theirs in zip(chain.sequence, sequence, strict=True)
            ):
                return chain
        return None

    def lines(self) -> list[str]:
        from .fit_contacts import table

        if self.chains and not self.found:
            have = ", ".join(f"{chain.name} ({len(chain.sequence)})" for chain in list(self.chains.values())[:5])
            return [f"structure no protein has the sequence of a chain in --structure: {have} residues"]
        return [line for name, chain, found in self.found for line in (f"{name}, {chain}:", *table(found))]


def _noted(tokens, waiting: deque):
    from ..alphabet import TOKENS

    for chunk in tokens:
        bounds = chunk.offsets.tolist()
        for start, end in zip(bounds, bounds[1:], strict=False):
            waiting.append("".join(TOKENS[i] for i in chunk.ids[start:end].tolist()))
        yield chunk


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


def _draw(folder: Path, name: str, contacts, title: str, sequence: str, chain) -> None:
    from ..plots.contact_map import write_map

    folder.mkdir(exist_ok=True)
    write_map(folder / f"{name}.png", contacts, title, sequence, None if chain is None else chain.truth)
