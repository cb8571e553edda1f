"""esm-fast report: one page about a protein or a few."""

import argparse
import time
from pathlib import Path

from .common import (
    InputError,
    add_batch_tokens,
    add_model,
    add_policies,
    dtype_of,
    is_random,
    load_model,
    output_path,
    progress,
)
from .contacts import worth_lines, worth_of
from .export import finished, layer_of
from .numbers import positive
from .search import embedded, ids_by_row, model_of
from .variants import read_proteins
from .variants_models import tell_proteins

NAME = "report"
ORDER = 24
HELP = "one page about a protein: contacts, all substitutions, entropy, neighbours"
DESCRIPTION = """\
Writes one HTML file, which needs no network: for each protein a summary, a heat map of all
substitutions, those that the model finds the most likely, the entropy of each residue, its contacts,
and with --data-set its nearest neighbours there. Each residue is masked in turn, a pass each; with
--scan wt nothing is masked, which takes one pass a protein and is less exact."""
EXAMPLES = """\
  esm-fast report p53.fasta -o p53.html --model esm1b_t33_650M_UR50S
  esm-fast report p53.fasta -o p53.html --scan wt --data-set uniref50/
"""
_MOST = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fasta", nargs="+", metavar="FASTA", help=f"FASTA files of up to {_MOST} proteins")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.html", help="the page to write")
    parser.add_argument("--force", action="store_true", help="overwrite OUT.html")
    parser.add_argument("--scan", default="masked", choices=("masked", "wt"), help="(default: %(default)s)")
    parser.add_argument("--data-set", metavar="FOLDER", help="of esm-fast embed: where to look for neighbours")
    parser.add_argument("-k", type=positive, default=10, metavar="K", help="neighbours (default: %(default)s)")
    parser.add_argument("--regression", metavar="FILE", help="of esm-fast fit-contacts (default: the model's own)")
    add_batch_tokens(parser)
    add_model(parser)
    add_policies(parser, overlength=("window",))


def run(args: argparse.Namespace) -> None:
    out = output_path(args.output, args.force)
    proteins, counts = read_proteins(args)
    if len(proteins) > _MOST:
        raise InputError(
            f"a page is for at most {_MOST} proteins, and there are {len(proteins):,}; see esm-fast variants"
        )
    from ..files.atomic import atomic
    from ..plots.report_page import page

    start, dtype = time.perf_counter(), dtype_of(args)
    data = finished(args.data_set) if args.data_set else None
    shared = data is not None and _computes(data, args.model, dtype)
    neighbours = _neighbours(data, args.k, proteins, model_of(data, None)) if data is not None and not shared else None
    options = dict(device=args.device, backend=args.backend, threads=args.threads, regression=args.regression)
    model = load_model(args.model, dtype=dtype, contacts=False, **options)
    if shared:
        neighbours = _neighbours(data, args.k, proteins, model)
    found = []
    with progress(sum(map(len, proteins.values()))) as bar:
        for name, protein in proteins.items():
            found.append(_findings(args, model, name, protein, dtype, neighbours and neighbours[name]))
            bar.update(len(protein))
    by = f"{args.model}, {dtype}" + (": RANDOM WEIGHTS, THESE NUMBERS MEAN NOTHING" if is_random(args.model) else "")
    lines = [line.removeprefix("worth     ") for line in worth_lines(worth_of(args))]
    worth = " ".join(f"{line[:1].upper()}{line[1:]}." for line in lines)
    with atomic(out) as temporary:
        temporary.write_text(page(found, ", ".join(proteins), f"{by}; written by esm-fast report", worth), "utf-8")
    _summary(args, out, proteins, counts, dtype, time.perf_counter() - start)


def _findings(args: argparse.Namespace, model, name: str, protein: str, dtype: str, neighbours):
    import numpy as np

    from ..alphabet import TOKENS
    from ..plots.heat_map import COLUMNS, HeatMap
    from ..plots.report_page import Findings
    from ..variants import log_probs
    from ..variants.scores import ratios_of

    masked = args.scan == "masked"
    logs = log_probs(model, protein, masked, batch_tokens=args.batch_tokens)
    own = logs[np.arange(len(protein)), [TOKENS.index(residue) for residue in protein]]
    standard = np.exp(logs[:, [TOKENS.index(residue) for residue in COLUMNS]])
    standard /= standard.sum(axis=1, keepdims=True)
    entropy = -(standard * np.log2(np.maximum(standard, 1e-300))).sum(axis=1)
    heat_map = HeatMap(name, protein, ratios_of(logs, protein), f"{args.scan}, {args.model}, {dtype}")
    perplexity = float(np.exp(-own.mean())) if masked else None
    return Findings(heat_map, perplexity, entropy, _contacts(model, protein), neighbours)


def _contacts(model, protein: str):
    """The map, or why there is none."""
    from ..inference.outputs import make
    from ..inference.stream import run as run_model
    from ..sequences.fasta import records_from
    from ..sequences.tokenize import Policy, Report, tokenize

    try:
        model.contact_head.require_fitted()
    except ValueError as error:
        return str(error)
    limit = model.config.limit("error")
    if limit is not None and len(protein) > limit:
        return f"The protein has more than the {limit:,} residues that contacts can be predicted of at once."
    tokens = (tokenize(records, Policy(), Report()) for records in records_from([("p", protein)]))
    (found,) = run_model(model, tokens, [make("contacts")], limit or len(protein) + 2)
    return found.arrays[0]


def _computes(data, name: str, dtype: str) -> bool:
    """Whether a model is the one that a data set was made with: then it is loaded once."""
    from ..dataset.fingerprint import of_model

    return dtype == data.plan.settings.dtype and of_model(name) == data.plan.settings.model


def _neighbours(data, k: int, proteins: dict[str, str], model) -> dict[str, list[tuple[str, float]]]:
    """By a protein's name, the nearest of the data set."""
    import numpy as np

    from ..dataset.neighbours import search

    layer = layer_of(data, -1)
    _, rows = embedded(data, list(proteins.items()), layer, model)
    hits = search(data, np.array(rows), k, layer)
    ids = ids_by_row(data, hits.rows)
    pairs = [
        zip(rows, cosines, strict=True) for rows, cosines in zip(hits.rows.tolist(), hits.cosines.tolist(), strict=True)
    ]
    return {
        name: [(found, cosine) for row, cosine in each for found in ids.get(row, ())]
        for name, each in zip(proteins, pairs, strict=True)
    }


def _summary(args: argparse.Namespace, out: Path, proteins: dict, counts, dtype: str, seconds: float) -> None:
    tell_proteins(args.summary.say, proteins, counts)
    args.summary.say(
        f"scan      {args.scan}, in {seconds:.1f} s",
        f"model     {args.model} ({dtype})",
        compute_seconds=round(seconds, 3),
        scan=args.scan,
        model=args.model,
        dtype=dtype,
    )
    args.summary.output(out)
