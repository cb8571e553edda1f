"""esm-fast variants: scores of variants in a table, or of every substitution of the proteins."""

import argparse
import time
from collections import Counter
from pathlib import Path

from ..variants.parse import shown
from .common import (
    InputError,
    add_batch_tokens,
    add_model,
    add_policies,
    ingest_of,
    output_path,
    progress,
)
from .numbers import LARGEST, positive, whole
from .variants_models import Models, job_factory, tell, tell_proteins

NAME = "variants"
ORDER = 23
HELP = "variant effects: tables of variants, or all substitutions, scored"
DESCRIPTION = """\
Scores variants of proteins: the lower, the less likely the model finds them (docs/variants.md says
what each strategy computes and costs, and which to choose).

--variants FILE   tables of variants, told apart by content: ProteinGym's and predict.py's CSV (mutant),
                  esm-variants' CSV (mut_name), its matrix and its pairs (wt_seq, mut_seq, start_pos),
                  MaveDB's (hgvs_pro), AlphaMissense's TSV (protein_variant), Parquet, a variant a line;
                  plain or compressed. Rows and columns stay, a column a model is added
without           all 19 substitutions of each residue

OUT ends in .csv, .tsv, .parquet (also .csv.gz, .tsv.gz); .png and .html draw a heat map of one protein;
OUT/ is a data set of all substitutions, for proteomes: interrupted runs resume, several processes share
the work (--shard), esm-fast verify checks it, and --lookup 'P04637 R175H' reads one score of it."""
EXAMPLES = """\
  esm-fast variants tem1.fasta -o scores.csv --variants tem1.csv --offset auto --strategy masked
  esm-fast variants p53.fasta -o p53.html --model esm1b_t33_650M_UR50S
  esm-fast variants p53.fasta -o p53.csv --png --model esm1v_t33_650M_UR90S_1 esm1v_t33_650M_UR90S_2
  esm-fast variants proteome.fasta.gz -o atlas/ --model esm1b_t33_650M_UR50S
  esm-fast variants atlas/ --lookup 'P04637 R175H' 'P38398 p.Cys61Gly'
"""
_DRAWN = (".png", ".html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fasta", nargs="*", metavar="FASTA", help="the wild types; none for a table of pairs")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="OUT.csv, .tsv, .parquet, .png or .html; or a folder, OUT/"
    )
    parser.add_argument("--lookup", nargs="+", metavar="QUERY", help="scores of a data set, which stands for the FASTA")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--variants", nargs="+", default=[], metavar="FILE", help="tables of variants")
    parser.add_argument("--variant-col", metavar="NAME", help="column with the variants (default: found by its name)")
    parser.add_argument(
        "--protein-col", metavar="NAME", help="column with the proteins' ids (default: found by its name)"
    )
    parser.add_argument(
        "--strategy",
        type=_names,
        default="wt",
        metavar="NAME",
        help="wt, masked, masked-joint, mutant, pll, pllr; for --variants several: wt,masked (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        default="auto",
        choices=("auto", "optimal", "brandes", "proteingym", "error", "whole"),
        help="for proteins over 1,022 residues (default: %(default)s, what the strategy was published with)",
    )
    _add_rules(parser)
    _add_tables(parser)
    add_batch_tokens(parser)
    add_model(parser, several=True, dtype="auto")
    add_policies(parser, overlength=("window",))


def _add_rules(parser: argparse.ArgumentParser) -> None:
    """How scores are read and put together."""
    parser.add_argument(
        "--combine",
        default="mean",
        choices=("mean", "min", "none"),
        help="column for several models (default: %(default)s)",
    )
    parser.add_argument(
        "--offset",
        type=_offset,
        default=0,
        metavar="N|auto",
        help="position p is residue p - N of the protein (default: 0)",
    )
    parser.add_argument(
        "--invalid",
        default="error",
        choices=("error", "keep"),
        help="rows that do not fit their protein, or have no score under the strategy; keep leaves the score empty and "
        "says why in a column (default: %(default)s)",
    )
    parser.add_argument(
        "--compat", action="store_true", help="reproduce the published scripts' errors (pll: off by one)"
    )


def _add_tables(parser: argparse.ArgumentParser) -> None:
    """How what is written looks."""
    parser.add_argument(
        "--format",
        choices=("long", "matrix", "proteingym", "mavedb", "alphamissense"),
        help="of all substitutions: esm-variants' table or matrix, or columns as others name them (default: long; "
        "alphamissense for .tsv)",
    )
    parser.add_argument("--store", choices=("float16", "float32"), help="numbers of a data set (default: float16)")
    parser.add_argument("--shard", metavar="I/N", help="of a data set: compute the I-th of N shares, from 0")
    parser.add_argument("--unit-residues", type=positive, metavar="N", help="of a data set: residues in a unit")
    parser.add_argument("--log-json", metavar="FILE", help="of a data set: add a JSON line for each unit")
    parser.add_argument("--png", action="store_true", help="also draw each protein's heat map, in the folder OUT.maps")


def _offset(text: str) -> int | str:
    return text if text == "auto" else whole(-LARGEST)(text)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def run(args: argparse.Namespace) -> int:
    from ..variants.strategies import strategy
    from ..variants.tables import ENDINGS

    if args.lookup:
        from .variants_dataset import look_up

        return look_up(args)
    if args.output is None:
        raise InputError("give -o OUT, or with a data set --lookup 'P04637 R175H'")
    if args.output.endswith("/") or Path(args.output).is_dir():
        from .variants_dataset import make_dataset

        return make_dataset(args)
    for name in ("store", "shard", "unit_residues", "log_json"):
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} is for data sets; give a folder, -o NAME/")
    out = output_path(args.output, args.force)
    for name in args.strategy:
        strategy(name)
    if not args.output.lower().endswith(ENDINGS + _DRAWN):
        raise InputError(f"{out} ends in none of {', '.join(ENDINGS + _DRAWN)}")
    if not args.fasta and not args.variants:
        raise InputError("give a FASTA of wild types, or with --variants a table that has them (wt_seq)")
    proteins, counts = read_proteins(args) if args.fasta else ({}, None)
    if args.variants:
        from .variants_table import score_tables

        return score_tables(args, out, proteins, counts, Models(args))
    return _scan(args, out, proteins, counts, Models(args))


def read_proteins(args: argparse.Namespace):
    """{id: residues}, and the counts of reading them."""
    from ..alphabet import TOKENS
    from ..sequences.ingest import Counts
    from ..variants.bind import require_protein
    from ..variants.windows import RESIDUES

    counts, proteins = Counts(), {}
    for batch in ingest_of(args, RESIDUES).read(args.fasta, counts):
        tokens = batch.tokens
        bounds = tokens.offsets.tolist()
        for name, number, start, end in zip(batch.ids, tokens.numbers.tolist(), bounds, bounds[1:], strict=False):
            try:
                proteins[name] = require_protein("".join(TOKENS[i] for i in tokens.ids[start:end].tolist()))
            except ValueError as error:
                raise InputError(f"{batch.source}: record {number + 1} ({shown(name)}), {error}") from None
    if not proteins:
        raise InputError(f"nothing is left to score: all {counts.report.records} records were skipped")
    return proteins, counts


# ---- all substitutions


def _cost(job, residues: int) -> int:
    """About the tokens of a scan."""
    width = min(residues + 2, 1024)
    if job.how.LENGTHS:
        return 19 * residues * (residues if job.how.NAME == "pll" else 1) * width
    return residues * width if job.how.MASKED else residues + 2


def _scan(args: argparse.Namespace, out: Path, proteins: dict, counts, models: Models) -> int:
    from ..variants.scores import scans
    from .variants_scan import write_scans

    if len(args.strategy) > 1:
        raise InputError("all substitutions are scored by one strategy; several are for --variants")
    (strategy,) = args.strategy
    job_of, start, names = job_factory(args, strategy), time.perf_counter(), list(proteins)
    total = sum(_cost(job_of(text), len(text)) for text in proteins.values()) * len(args.model)
    with progress(total, unit="tokens") as bar:

        def scanned(model, budget: int):
            return scans(model, proteins.values(), strategy, args.window, budget, bar.update)

        if len(args.model) == 1:
            ((model, budget),) = iter(models)
            found = zip(names, proteins.values(), ([scan] for scan in scanned(model, budget)), strict=True)
        else:
            columns = [[scan.astype("float32") for scan in scanned(*one)] for one in models]
            together = (models.combine(list(group)) for group in zip(*columns, strict=True))
            found = zip(names, proteins.values(), together, strict=True)
        rows = write_scans(args, out, found, models, len(proteins))
    tell_proteins(args.summary.say, proteins, counts)
    tell(args, models, Counter(rows=rows), out, time.perf_counter() - start)
    return 0
