"""python -m esm_fast.variants.predict: in place of fair-esm's examples/variant-prediction/predict.py, same arguments.

The output has a column for the rows' numbers, the input's columns, and one for each model, named by its location. The
strategy pseudo-ppl is computed as it was meant; --compat gives the published script's numbers, which are off by one.
"""

import argparse
import re
import sys
from pathlib import Path

from ..console import boundary
from ..console.streams import screens

_STRATEGIES = ("wt-marginals", "pseudo-ppl", "masked-marginals")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m esm_fast.variants.predict", description=__doc__.split("\n\n")[1])
    top.add_argument("--model-location", nargs="+", required=True, help="published names, or files")
    top.add_argument("--sequence", required=True, help="the wild type")
    top.add_argument("--dms-input", type=Path, required=True, help="CSV with the variants")
    top.add_argument("--mutation-col", default="mutant", help="its column with them (default: %(default)s)")
    top.add_argument("--dms-output", type=Path, required=True, help="CSV to write")
    top.add_argument("--offset-idx", type=int, default=0, help="position of the sequence's first residue (default: 0)")
    top.add_argument("--scoring-strategy", default="wt-marginals", choices=_STRATEGIES, help="default: %(default)s")
    top.add_argument("--msa-path", type=Path, help="for the MSA Transformer, which esm_fast does not have")
    top.add_argument("--msa-samples", type=int, default=400, help="the same")
    top.add_argument("--lowercase-type", choices=("insertion", "nonfocus"), default="nonfocus", help="the same")
    top.add_argument("--nogpu", action="store_true", help="do not use a GPU")
    top.add_argument("--compat", action="store_true", help="the published script's pseudo-ppl, errors included")
    return top


def main(argv: list[str] | None = None) -> int:
    with screens():
        return boundary.run("predict", _run, parser().parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    from ..files.atomic import atomic
    from .api import score
    from .tables import Table, TableError, writer

    if args.msa_path is not None:
        raise ValueError("--msa-path is for the MSA Transformer, which esm_fast does not have")
    table = Table(args.dms_input)
    if args.mutation_col not in table.columns:
        raise TableError(f"{args.dms_input} has no column {args.mutation_col!r}; there are {', '.join(table.columns)}")
    at = table.columns.index(args.mutation_col)
    variants = [row[at] for row in table.rows()]
    if args.scoring_strategy == "pseudo-ppl" and not args.compat:
        print("note: pseudo-ppl without the published script's off by one; --compat reproduces it", file=sys.stderr)
    options = dict(strategy=args.scoring_strategy, offset=args.offset_idx - 1, combine="none", compat=args.compat)
    device = "cpu" if args.nogpu else "auto"
    try:
        scores = score(args.model_location, args.sequence, variants, device=device, packed="auto", **options)
    except ValueError as error:
        raise ValueError(_in_its_terms(str(error))) from None
    # As pandas names columns without a name, and numbers the rows in the first.
    names = [name or f"Unnamed: {i}" for i, name in enumerate(table.columns)]
    columns = ["", *names, *args.model_location]
    with atomic(args.dms_output) as temporary, writer(temporary, str(args.dms_output), columns, set()) as add:
        for number, (row, found) in enumerate(zip(table.rows(), scores.tolist(), strict=True)):
            add([str(number), *row, *map(repr, found)])


def _in_its_terms(message: str) -> str:
    """Offsets as --offset-idx counts them: the position of the first residue."""
    said = re.sub(r"\boffset=(-?\d+)", lambda found: f"--offset-idx {int(found[1]) + 1}", message)
    return re.sub(r"(fits more than )(-?\d+)", lambda found: f"{found[1]}{int(found[2]) + 1}", said)


if __name__ == "__main__":
    sys.exit(main())
