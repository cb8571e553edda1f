"""esm-fast search: the nearest proteins of a data set."""

import argparse
import sys
from pathlib import Path

from ..console.streams import printable
from .common import InputError, as_flags, load_model, progress
from .export import finished, layer_of
from .numbers import layer_number, positive

NAME = "search"
ORDER = 15
HELP = "the nearest proteins of a data set, by cosine"
DESCRIPTION = """\
Compares each query with every protein of a data set, exactly, and prints a table: query, rank, id,
cosine. A query is an id of the data set; or every protein of a FASTA file (- is standard input),
embedded with the data set's model; or every protein of another data set of the same model. Proteins
with the same sequence share a rank, and each has a line."""
EXAMPLES = """\
  esm-fast search uniref50/ P69905
  esm-fast search uniref50/ new.fasta -k 50 > hits.tsv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="the folder of a data set")
    parser.add_argument("query", metavar="QUERY", help="an id of it, a FASTA file, or the folder of a data set")
    parser.add_argument("-k", type=positive, default=10, metavar="K", help="sequences to find (default: %(default)s)")
    parser.add_argument("--layer", type=layer_number, default=-1, metavar="N", help="default: the last one stored")
    parser.add_argument("--model", metavar="NAME|PATH", help="where the data set's model is (default: where it was)")


def run(args: argparse.Namespace) -> None:
    data = finished(args.dataset)
    from ..dataset.neighbours import search

    layer = layer_of(data, args.layer)
    names, queries = _queries(data, args, layer)
    with progress(len(queries) * data.plan.info["sequences"], "pairs", delay=1, desc="comparing") as bar:
        hits = search(data, queries, args.k, layer, bar.update)
    ids_of = ids_by_row(data, hits.rows)
    args.summary.say("query\trank\tid\tcosine", dataset=str(data.folder), layer=layer, queries=len(names))
    found = []
    for name, rows, cosines in zip(names, hits.rows.tolist(), hits.cosines.tolist(), strict=True):
        for rank, (row, cosine) in enumerate(zip(rows, cosines, strict=True), 1):
            for hit in ids_of.get(row, ()):
                if args.json:
                    found.append({"query": name, "rank": rank, "id": hit, "cosine": cosine})
                else:
                    print(f"{printable(name)}\t{rank}\t{printable(hit)}\t{cosine:.6f}")
    settings = data.plan.settings
    print(f"searched  {len(names):,} queries in {len(data):,} proteins ({settings.dtype})", file=sys.stderr)
    args.summary.time(sys.stderr)  # standard output is the table
    args.summary.say(hits=found, model=data.plan.info["model"], dtype=settings.dtype)


def _queries(data, args: argparse.Namespace, layer: int):
    """Ids and embeddings of the queries."""
    import numpy as np

    path = Path(args.query)
    if args.query in data:  # whatever lies in the working directory; ./NAME is the file
        return [args.query], data.embedding(args.query, layer)[None]
    if args.query != "-" and path.is_dir():
        other = finished(args.query)
        _require_same_numbers(data, other)
        return other.ids, other.matrix(layer)
    if args.query == "-" or path.is_file():
        names, rows = embedded(data, args.query, layer, model_of(data, args.model))
        return names, np.array(rows)
    raise InputError(f"{args.query!r} is neither an id of {data.folder} nor a file or folder")


def model_of(data, name: str | None):
    """The model that a data set was made with, from where it was or from `name`, for the kernels that computed it where
    they run here. Raises InputError for another."""
    from ..dataset.fingerprint import of_model
    from ..ops import verdicts

    name = name or data.plan.info["model"]
    if of_model(name) != data.plan.settings.model:
        raise InputError(f"{name} is not the model that {data.folder} was made with; give --model")
    kernels, backend, why_others = _computed_by(data.plan.settings)
    if why_others:
        print(f"warning: the query is computed by other kernels than the data set ({why_others})", file=sys.stderr)
    with verdicts.held(kernels):
        return load_model(name, dtype=data.plan.settings.dtype, backend=backend)


def embedded(data, proteins, layer: int, model) -> tuple[list[str], list]:
    """What `embed` takes, with the data set's model, kernels and policies."""
    from ..inference.embed import embed
    from ..ops import verdicts
    from ..sequences.fasta import FastaError
    from ..sequences.names import accession

    settings = data.plan.settings
    policies = {policy: getattr(settings, policy) for policy in ("unknown", "empty", "overlength")}
    kernels, *_ = _computed_by(settings)
    try:
        with verdicts.held(kernels), progress(_count(proteins), "proteins", delay=1, desc="embedding") as bar:
            pairs = []
            for header, arrays in embed(model, proteins, layers=(layer,), pool=settings.pool, **policies):
                pairs.append((accession(header), arrays[layer]))
                bar.update()
    except FastaError as error:
        raise InputError(as_flags(str(error)).split("; use ")[0]) from None
    return [name for name, _ in pairs], [row for _, row in pairs]


def _count(proteins) -> int | None:
    """How many there are; of what can be read once only, nobody knows."""
    from ..sequences.fasta import read_fasta

    if not isinstance(proteins, str):
        return len(proteins)
    return sum(map(len, read_fasta(proteins))) if Path(proteins).is_file() else None


def _computed_by(settings) -> tuple[str, str | None, str]:
    """The kernels and the backend that computed a data set where they run here; else the order's, and why: a query then
    differs from the data set's own numbers by rounding."""
    import torch

    from ..ops import BackendError, registry

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = None if settings.backend == "auto" else settings.backend
    dtype = "float32" if settings.dtype == "int8" else settings.dtype  # all but the layers' matrices
    try:
        registry.require_choices(settings.kernels, backend, device, getattr(torch, dtype))
    except BackendError as error:
        return "", None, str(error)
    return settings.kernels, backend, ""


def _require_same_numbers(data, other) -> None:
    for name in ("model", "pool", "dtype"):
        if getattr(data.plan.settings, name) != getattr(other.plan.settings, name):
            raise InputError(f"{other.folder} has another {name} than {data.folder}: their numbers do not compare")


def ids_by_row(data, rows) -> dict[int, list[str]]:
    """The ids of each sequence that was found."""
    ids: dict[int, list[str]] = {row: [] for row in set(rows.ravel().tolist()) - {-1}}
    for name, row in zip(data.ids, data.rows.tolist(), strict=True):
        if row in ids:
            ids[row].append(name)
    return ids
