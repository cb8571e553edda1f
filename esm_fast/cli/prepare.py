"""esm-fast prepare: FASTA files to the token store that pretraining reads."""

import argparse
import time
from pathlib import Path

from .common import InputError, Stages, add_max_record
from .numbers import share
from .reading import Watched, bytes_of

NAME = "prepare"
ORDER = 40
HELP = "FASTA files to a token store for pretraining"
DESCRIPTION = """\
Reads FASTA files (plain, gz, bz2, xz or zst; - is standard input) into a token store: a folder of
memory-mapped files with a byte a residue. Exact duplicates are dropped, and a share of the proteins
is held out for validation. Memory grows by about a hundred bytes a protein."""
EXAMPLES = """\
  esm-fast prepare uniref50.fasta.gz -o uniref50.store --unknown x
  esm-fast prepare uniref50.fasta.gz -o uniref50.store --unknown x --valid held_out.fasta
  esm-fast prepare proteins.fasta -o proteins.store --clusters clusters.tsv --valid-share 0.05

The table of --clusters has two columns, cluster and member, as mmseqs createtsv writes them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fasta", nargs="+", metavar="FASTA", help="FASTA files, or - for standard input")
    parser.add_argument("-o", "--output", required=True, metavar="STORE", help="the folder to make")
    parser.add_argument(
        "--valid-share",
        type=share,
        default=0.01,
        metavar="X",
        help="share that is held out (default: %(default)s)",
    )
    parser.add_argument(
        "--clusters", metavar="TSV", help="hold out whole clusters (default: single proteins, by a hash of each)"
    )
    parser.add_argument(
        "--valid", nargs="+", metavar="FASTA", default=[], help="hold out the records of these files, and no others"
    )
    parser.add_argument(
        "--unknown",
        default="error",
        choices=("error", "x", "skip"),
        help="residues ESM-1b does not know; x reads them as X (default: %(default)s)",
    )
    parser.add_argument(
        "--empty", default="error", choices=("error", "skip"), help="records without residues (default: %(default)s)"
    )
    parser.add_argument(
        "--gaps",
        default="error",
        choices=("error", "remove"),
        help="'-' and '.', as alignments have them (default: %(default)s)",
    )
    add_max_record(parser)


def run(args: argparse.Namespace) -> None:
    from ..sequences.tokenize import Policy
    from ..train.prepare import prepare, read_clusters

    out = Path(args.output)
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist; make it first")
    if args.valid and args.clusters:
        raise InputError("--clusters divides the records, and --valid says which are held out: give one of them")
    policy = Policy(args.unknown, args.empty, overlength="window", gaps=args.gaps)
    clusters = read_clusters(args.clusters) if args.clusters else None
    start = time.perf_counter()
    files = [*args.valid, *args.fasta]
    with Stages() as bar:
        bar.begin("reading", bytes_of(files), "B")
        summary = prepare(
            [Watched(path, bar.update) for path in args.fasta],
            out,
            policy=policy,
            valid_share=args.valid_share,
            valid=[Watched(path, bar.update) for path in args.valid],
            clusters=clusters,
            max_record=args.max_record,
            on_stage=bar.begin,
            on_copied=bar.update,
        )
    report, seconds = summary.report, time.perf_counter() - start
    skipped = {"unknown residue": report.skipped_unknown, "empty": report.empty, "special token": report.specials}
    skipped["duplicate"] = summary.duplicates
    how = "clusters" if args.clusters else "a hash of each sequence"
    how = f"--valid {' '.join(args.valid)}" if args.valid else how
    args.summary.say(
        f"records   {report.records:,} in {seconds:.1f} s",
        f"skipped   {', '.join(f'{count:,} {what}' for what, count in skipped.items())}",
        f"changed   {report.unknown:,} unknown residues read as X, {report.stops_stripped:,} final * stripped",
        f"training  {summary.train:,} proteins, {summary.train_residues:,} residues",
        f"held out  {summary.valid:,} proteins, {summary.valid_residues:,} residues, by {how}",
        records=report.records,
        skipped=skipped,
        changed={"unknown residues read as X": report.unknown, "final * stripped": report.stops_stripped},
        train={"proteins": summary.train, "residues": summary.train_residues},
        valid={"proteins": summary.valid, "residues": summary.valid_residues, "by": how},
    )
    args.summary.output(out)
