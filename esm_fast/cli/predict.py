"""esm-fast predict: what a predictor of esm-fast finetune says of the proteins of FASTA files."""

import argparse
import time
from collections import deque
from itertools import repeat
from pathlib import Path

from .common import (
    InputError,
    add_batch_tokens,
    add_policies,
    dtype_of,
    ingest_of,
    load_model,
    output_path,
    progress,
    tell_result,
)
from .numbers import positive

NAME = "predict"
ORDER = 43
HELP = "numbers or classes of proteins, by a predictor of esm-fast finetune"
DESCRIPTION = """\
Runs a predictor, a folder that esm-fast finetune wrote, over FASTA files (plain, gz, bz2, xz or zst;
- is standard input), in packed batches as esm-fast embed does. The table has a row a protein, or a
row a residue: the number, or the class and the probability of each class. Memory is bounded.
A predictor of pairs takes a table with two columns of sequences, or FASTA files and --pairs, a table with two columns
of ids; the vectors of all different proteins are in memory then."""
EXAMPLES = """\
  esm-fast predict stability/ proteins.fasta.gz -o stability.csv
  esm-fast predict ss3/ proteins.fasta -o ss3.parquet --overlength window
  esm-fast predict ppi/ proteins.fasta --pairs pairs.tsv --id-column bait prey -o interactions.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("predictor", metavar="MODEL", help="the folder of a predictor")
    add("fasta", nargs="+", metavar="FASTA", help="FASTA files, or - for standard input; of pairs, see above")
    add("-o", "--output", required=True, metavar="TABLE", help="OUT.csv, .tsv (.gz too) or .parquet")
    add("--force", action="store_true", help="overwrite the table")
    add("--pairs", metavar="TABLE", help="of a predictor of pairs: ids of the FASTA's proteins, two a row")
    add("--id-column", nargs=2, metavar="NAME", help="of pairs (default: id_a and id_b, or alike)")
    add("--sequence-column", nargs=2, metavar="NAME", help="of pairs (default: sequence_a and sequence_b, or alike)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s: a GPU)")
    add(
        "--dtype",
        default="float32",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: as for embed; the predictor was measured in float32 (default: %(default)s)",
    )
    add("--base", metavar="NAME|PATH", help="where the model now is on which a predictor without one was trained")
    add("--backend", help="insist on a backend; esm-fast info lists them (default: the fastest)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: one per core)")
    add_batch_tokens(parser)
    add_policies(parser, overlength=("error", "truncate", "window"))


def run(args: argparse.Namespace) -> None:
    from ..files.atomic import atomic
    from ..inference.embed import token_budget
    from ..sequences.ingest import Counts, Source
    from ..train.predictor import load_predictor, model_of
    from ..variants.tables import ENDINGS

    out = output_path(args.output, args.force)
    if not out.name.lower().endswith(ENDINGS):
        raise InputError(f"{out} is no table; give a name that ends in {', '.join(ENDINGS)}")
    args.model = args.base or str(model_of(args.predictor))
    dtype = dtype_of(args)
    options = dict(device=args.device, dtype=dtype, backend=args.backend, threads=args.threads)
    predictor = load_predictor(args.predictor, base=args.base, load_model=lambda model: _model(model, options))
    ingest = ingest_of(args, predictor.esm.config.limit(args.overlength))
    if predictor.pairs:
        from .predict_pairs import predict_pairs

        return predict_pairs(args, predictor, ingest.policy, out, dtype)
    if args.pairs:
        raise InputError(f"{args.predictor} is no predictor of pairs; leave --pairs out")
    with Source(args.fasta, ingest) as source:
        expected, counts, start = source.scan(), Counts(), time.perf_counter()
        with atomic(out) as temporary, progress(expected.residues) as bar:
            written = _write(
                predictor,
                source.tokens(counts),
                temporary,
                out.name,
                batch_tokens=token_budget(predictor.esm, args.batch_tokens),
                window=ingest.policy.window,
                on_batch=bar.update,
            )
            if counts != expected or written != counts.proteins:
                raise InputError("the input changed while it was read; nothing was written")
        seconds = time.perf_counter() - start
    tell_result(args, counts, seconds, args.predictor, dtype)
    args.summary.output(out)


def _model(model, options: dict):
    """Of a path or a checkpoint that was put together."""
    return load_model(str(model) if isinstance(model, Path) else model, **options)


def _write(predictor, tokens, path: Path, name: str, **options) -> int:
    """Returns the number of proteins."""
    from .predictions import table

    residues, written = deque(), 0  # of the proteins that the stream has taken and not given back

    def watched():
        for chunk in tokens:
            if predictor.per_residue:
                spans = zip(chunk.offsets[:-1], chunk.offsets[1:], strict=True)
                residues.extend(chunk.ids[start:end] for start, end in spans)
            yield chunk

    with table(path, name, predictor.targets) as add:
        for label, (outputs,) in predictor.outputs(watched(), **options):
            ids = residues.popleft() if predictor.per_residue else None
            add([label.name], ids, outputs, repeat((), len(outputs)))
            written += 1
    return written
