"""esm-fast embed: FASTA in; out one HDF5 file keyed as UniProt keys its embeddings, or a data set of any size."""

import argparse
import time
from pathlib import Path

from .. import __version__
from .common import (
    MEANINGLESS,
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
    tell_result,
)
from .dataset import add_dataset, is_dataset, refuse_dataset_flags
from .numbers import layer_number

NAME = "embed"
ORDER = 10
HELP = "embeddings of FASTA files, as one HDF5 file or as a data set of any size"
DESCRIPTION = """\
Embeds the proteins of FASTA files (plain, gz, bz2, xz or zst; - is standard input). All input is
checked before anything is computed.

-o OUT.h5   one HDF5 file, one data set a protein, named by its accession, as UniProt publishes
            embeddings; it appears only when it is complete
-o OUT/     a data set: a folder of Parquet shards (docs/embedding.md). An interrupted run resumes
            where it stopped with the same command, to the same bytes; several processes or machines
            share the work (--shard, SLURM, torchrun); equal sequences are computed once"""
EXAMPLES = """\
  esm-fast embed proteins.fasta.gz -o proteins.h5 --model esm1b_t33_650M_UR50S
  esm-fast embed proteins.fasta -o residues.h5 --pool per-residue --store float16 --overlength window
  esm-fast embed uniref50.fasta.gz -o uniref50/ --model esm1b_t33_650M_UR50S --overlength window
  zcat *.fasta.gz | esm-fast embed - -o layers.h5 --layers 0 16 -1 --unknown x --empty skip
"""
_ITEM_BYTES = {"float32": 4, "float16": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fasta", nargs="+", metavar="FASTA", help="FASTA files, or - for standard input")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="OUT.h5, or the folder of a data set")
    parser.add_argument("--force", action="store_true", help="overwrite OUT.h5")
    parser.add_argument(
        "--layers",
        nargs="+",
        type=layer_number,
        default=[-1],
        metavar="N",
        help="0 (the embedding) to the number of layers, or counted from the last, -1 (default: -1); several give a "
        "group each: layer_33/P12345",
    )
    parser.add_argument(
        "--pool",
        type=_pool,
        default="mean",
        help="what to keep of a protein: mean, max or std over its residues, cls, or per-residue (default: mean)",
    )
    parser.add_argument(
        "--store", choices=tuple(_ITEM_BYTES), default="float32", help="numbers in the file (default: %(default)s)"
    )
    add_batch_tokens(parser)
    add_dataset(parser)
    add_model(parser, dtype="auto")
    add_policies(parser, overlength=("error", "truncate", "window"))


def _pool(text: str) -> str:
    """One of the outputs that are made of a layer, with - for _; outputs are found by file, so none is listed here."""
    from ..inference.outputs import pools

    if _output_name(text) not in pools():
        known = ", ".join(name.replace("_", "-") for name in pools())
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}")
    return text


def _output_name(pool: str) -> str:
    return pool.replace("-", "_")


def run(args: argparse.Namespace) -> int | None:
    if is_dataset(args.output):
        from .embed_dataset import embed_dataset

        return embed_dataset(args)
    refuse_dataset_flags(args)
    out = output_path(args.output, args.force)
    dtype = dtype_of(args)
    model = load_model(args.model, device=args.device, dtype=dtype, backend=args.backend, threads=args.threads)

    from ..files.atomic import atomic
    from ..files.hdf5 import HDF5Writer, unstorable
    from ..inference.embed import layer_numbers, token_budget
    from ..inference.outputs import make
    from ..inference.stream import run as run_model
    from ..sequences.ingest import Counts, Source
    from ..sequences.names import hdf5_key

    layers = layer_numbers(model, args.layers)
    limit = model.config.limit(args.overlength)
    ingest = ingest_of(args, limit, safe=hdf5_key, unstorable=unstorable)
    budget = token_budget(model, args.batch_tokens)
    outputs = [make(_output_name(args.pool), layer) for layer in layers]
    attributes = {
        "model": args.model,
        "layers": layers,
        "pool": args.pool,
        "dtype": dtype,
        "overlength": args.overlength,
        "max_residues": limit,
        "esm_fast": __version__,
    }
    if is_random(args.model):
        attributes["warning"] = MEANINGLESS
    with Source(args.fasta, ingest) as source:
        expected, counts = source.scan(), Counts()
        check_space(out.parent, _size(expected, model.config.embed_dim, args, len(layers)))
        written, start = 0, time.perf_counter()
        with (
            atomic(out) as temporary,
            HDF5Writer(temporary, layers, store=args.store, attributes=attributes) as writer,
            progress(expected.residues) as bar,
        ):
            for protein in run_model(model, source.tokens(counts), outputs, budget, bar.update, ingest.policy.window):
                writer.add(protein.label.name, str(protein.label), protein.arrays)
                written += 1
            if counts != expected or written != counts.proteins:
                raise InputError("the input changed while it was read; nothing was written")
        seconds = time.perf_counter() - start
    _tell(args, out, layers, dtype, counts, seconds)


def _size(counts, embed_dim: int, args, layers: int) -> int:
    """About the bytes of the output."""
    from ..files.hdf5 import OVERHEAD
    from ..inference.outputs import make

    rows = counts.proteins if make(_output_name(args.pool), 0).per == "protein" else counts.residues
    return layers * (rows * embed_dim * _ITEM_BYTES[args.store] + counts.proteins * OVERHEAD)


def _tell(args, out: Path, layers: list[int], dtype: str, counts, seconds: float) -> None:
    tell_result(args, counts, seconds, args.model, dtype)
    stored = f"layers    {' '.join(map(str, layers))} ({args.pool}, stored as {args.store})"
    args.summary.say(stored, layers=layers, pool=args.pool, store=args.store)
    args.summary.output(out)
    group = "file" if len(layers) == 1 else f'file["layer_{layers[-1]}"]'
    args.summary.say(
        "",
        "Open it in Python:",
        "  import h5py",
        f"  with h5py.File({str(out)!r}) as file:",
        f"      embeddings = {{key: data[:] for key, data in {group}.items()}}",
    )
