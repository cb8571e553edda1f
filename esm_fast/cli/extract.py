"""esm-fast extract: fair-esm's scripts/extract.py, its arguments and its files."""

import argparse
import time
from pathlib import Path

from .common import InputError, check_space, load_model, progress, require_contacts, tell_result
from .numbers import layer_number, positive

NAME = "extract"
ORDER = 20
HELP = "fair-esm's extract.py: one .pt file a protein"
DESCRIPTION = """\
Takes the arguments of fair-esm's scripts/extract.py and writes its files: OUTDIR/<header>.pt, a
dictionary of label, representations (per_tok), mean_representations (mean), bos_representations
(bos) and contacts.

Other than there: characters that no file name should have are written as %XX, a header too long for
a file name is shortened with a hash, a header seen before gets _2 (the true label is in the file);
lower-case letters are read as upper-case; <mask> counts as one residue, and <eos> never enters a
mean; a record without residues is an error; memory does not grow with the input. As there, files
that exist are left as they are, unless they were cut short, so that an interrupted run can be
continued."""
EXAMPLES = """\
  esm-fast extract esm1b_t33_650M_UR50S proteins.fasta out --repr_layers 0 32 33 --include mean per_tok
  esm-fast extract my_model.pt proteins.fasta.gz out --include contacts --nogpu
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_location", metavar="MODEL", help="a model's name or path, see esm-fast embed --help")
    parser.add_argument("fasta_file", metavar="FASTA", help="a FASTA file, or - for standard input")
    parser.add_argument("output_dir", metavar="OUTDIR", type=Path, help="folder of the .pt files, made if need be")
    parser.add_argument("--toks_per_batch", type=positive, default=4096, help="tokens in a batch (default: 4096)")
    parser.add_argument(
        "--repr_layers",
        type=layer_number,
        nargs="+",
        default=[-1],
        help="0 (the embedding) to the number of layers, or counted from the last, -1 (default: -1)",
    )
    parser.add_argument(
        "--include",
        nargs="+",
        required=True,
        choices=("mean", "per_tok", "bos", "contacts"),
        help="what to write of a protein",
    )
    parser.add_argument(
        "--truncation_seq_length", type=positive, default=1022, help="residues to keep of a protein (default: 1022)"
    )
    parser.add_argument("--nogpu", action="store_true", help="do not use a GPU")


def run(args: argparse.Namespace) -> None:
    model = load_model(args.model_location, device="cpu" if args.nogpu else "auto")

    from ..files.fair_esm_pt import TorchFolder
    from ..inference.embed import layer_numbers
    from ..inference.stream import run as run_model
    from ..sequences.fasta import FastaError
    from ..sequences.ingest import Counts, Ingest, Source
    from ..sequences.names import file_name
    from ..sequences.tokenize import Policy

    if "contacts" in args.include:
        require_contacts(model, args.model_location)
    wanted = _outputs(args.include, layer_numbers(model, args.repr_layers))
    longest = model.config.limit("error")
    fits = args.truncation_seq_length <= longest  # else a protein over the model's length is an error, as there
    overlength, longest = "truncate" if fits else "error", min(args.truncation_seq_length, longest)
    policy = Policy(overlength=overlength, max_residues=longest, gaps="keep")  # tokens, as there
    with (
        TorchFolder(args.output_dir) as writer,
        Source([args.fasta_file], Ingest(policy, id_of=str, safe=file_name, done=writer.has)) as source,
    ):
        try:
            expected = source.scan()
        except FastaError as error:
            raise InputError(_without_flags(str(error))) from None
        counts, start = Counts(), time.perf_counter()
        check_space(args.output_dir, _size(wanted, expected, model.config.embed_dim))
        outputs = [output for _, output in wanted]
        with progress(expected.residues) as bar:
            for protein in run_model(model, source.tokens(counts), outputs, args.toks_per_batch, bar.update):
                writer.add(protein.label.name, str(protein.label), _entries(wanted, protein.arrays))
            if counts.report != expected.report:
                raise InputError("the input changed while it was read; start again")
    dtype = str(model.dtype).removeprefix("torch.")
    tell_result(args, counts, time.perf_counter() - start, args.model_location, dtype)
    args.summary.output(args.output_dir)


def _without_flags(message: str) -> str:
    return f"{message.split('; use ')[0]}; extract.py has no flag for such records, esm-fast embed has"


def _outputs(include: list[str], layers: list[int]) -> list[tuple[tuple, object]]:
    """((key, layer) in the .pt file, or (key,) for contacts; what the stream is to make)."""
    from ..inference.outputs import make

    keys = {"per_tok": "representations", "mean": "mean_representations", "bos": "bos_representations"}
    pools = {"per_tok": "per_residue", "mean": "mean", "bos": "cls"}
    wanted = [((keys[name], n), make(pools[name], n)) for name in keys if name in include for n in layers]
    return wanted + ([(("contacts",), make("contacts"))] if "contacts" in include else [])


def _size(wanted: list[tuple[tuple, object]], counts, embed_dim: int) -> int:
    """About the bytes of the output."""
    cells = {"contacts": counts.squares, "per_residue": counts.residues * embed_dim}
    return 4 * sum(cells.get(output.name, counts.proteins * embed_dim) for _, output in wanted)


def _entries(wanted: list[tuple[tuple, object]], arrays: list) -> dict:
    entries: dict = {}
    for ((key, *layer), _), array in zip(wanted, arrays, strict=True):
        if layer:
            entries.setdefault(key, {})[layer[0]] = array
        else:
            entries[key] = array
    return entries
