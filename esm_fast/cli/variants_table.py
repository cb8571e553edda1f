"""esm-fast variants --variants: tables in, the same rows and columns out, with scores."""

import argparse
import sys
import time
from functools import reduce
from itertools import product
from operator import or_
from pathlib import Path

from ..files.atomic import atomic
from .common import InputError, progress
from .dataset import SOME_FAILED
from .variants_models import job_factory, listed, tell, tell_proteins

_WHY = "not_scored_because"


def score_tables(args: argparse.Namespace, out: Path, proteins: dict[str, str], counts, models) -> int:
    from ..variants.formats import layout_of, opened
    from ..variants.rows import Collection

    if args.output.lower().endswith((".png", ".html")) or args.format or args.png:
        raise InputError("heat maps and --format are for all substitutions; leave --variants out for them")
    tables = [opened(Path(path)) for path in args.variants]
    layouts = [layout_of(table, args.variant_col, args.protein_col) for table in tables]
    if not proteins and any(layout.pairs is None for layout in layouts):
        raise InputError("give the FASTA of the wild types: a table has none, unless it has wt_seq and mut_seq")
    made = [Collection(proteins, protein_column=args.protein_col is not None) for _ in args.strategy]
    for rows, (table, layout) in product(made, list(zip(tables, layouts, strict=True))):
        rows.add(str(table.path), table.columns, layout, table.rows())
    jobs = [job_factory(args, strategy) for strategy in args.strategy]
    # Those that a strategy has no score for are the only ones that the strategies differ in.
    found = reduce(or_, [rows.check(job_of, args.offset) for rows, job_of in zip(made, jobs, strict=True)])
    problems = [rows.all_problems() for rows in made]
    for rows, wrong in zip(made, problems, strict=True):
        if wrong and args.invalid == "error":
            raise InputError(_advice(rows.explain()))
    start = time.perf_counter()
    columns = _columns(args, made, jobs, models)
    why = {problem.row: problem for wrong in problems for problem in wrong}
    _write(args, out, tables, columns, {row: str(problem.error) for row, problem in why.items()})
    if counts:
        tell_proteins(args.summary.say, proteins, counts)
    else:
        args.summary.say(f"proteins  {len(made[0].groups):,}", proteins=len(made[0].groups))
    offsets = {group.offset for group in made[0].groups.values() if not group.pairs}
    if args.offset == "auto" and offsets:
        args.summary.say(f"offset    {', '.join(map(str, sorted(offsets)[:5]))} (found)")
    args.summary.say(offsets=sorted(offsets), not_scored=len(why))
    tell(args, models, found, out, time.perf_counter() - start)
    if why:
        wrong = listed([why[row] for row in sorted(why)], made[0].where)
        print("\n".join([f"not scored {len(why):,} rows", *wrong]), file=sys.stderr)
    return SOME_FAILED if why else 0


def _advice(message: str) -> str:
    return message.replace("offset=", "--offset ") + "; --invalid keep leaves such rows without a score"


def _columns(args: argparse.Namespace, made: list, jobs: list, models) -> dict[str, object]:
    """Name -> a score a row, of each strategy and model, and combined; for pll the wild type's and the difference."""
    from ..variants.rows import asked, by_row
    from ..variants.scores import parts_of, scores_of

    wanted, by_model, bar = asked(made, jobs), [], None
    for model, budget in models:
        if bar is None:
            tokens = sum(part.plan.tokens for part in parts_of(model, wanted))
            bar = progress(len(args.model) * tokens, unit="tokens")
        by_model.append(by_row(made, scores_of(model, wanted, budget, bar.update)))
    bar.close()
    columns, names = {}, [*models.names, *([models.combined] if models.combined else [])]
    for strategy, pairs in zip(args.strategy, zip(*by_model, strict=True), strict=True):
        scores, bases = (models.combine(list(column)) for column in zip(*pairs, strict=True))
        for name, score, base in zip(names, scores, bases, strict=True):
            own = name if len(args.strategy) == 1 else f"{name}_{strategy}"
            columns[own] = score
            if _of(strategy) == "pll":
                columns |= {f"{own}_wild_type": base, f"{own}_difference": score - base}
    return columns


def _of(strategy: str) -> str:
    from ..variants.strategies import strategy as named

    return named(strategy).NAME


def _write(args: argparse.Namespace, out: Path, tables, scores: dict, why: dict[int, str]) -> None:
    """The tables' rows one after the other; of several tables, the columns of all and the file's name."""
    from ..variants.tables import writer

    numbered = [_numbered(table.columns) for table in tables]
    inputs = list(dict.fromkeys(key for keys in numbered for key in keys))
    headers = [name for name, _ in inputs] + (["file"] if len(tables) > 1 else [])
    taken = dict.fromkeys(headers)
    names = [_new(name, taken) for name in [*scores, *([_WHY] if args.invalid == "keep" else [])]]
    numbers, values = set(names[: len(scores)]), list(scores.values())
    comments = tables[0].comments if len(tables) == 1 else []
    with atomic(out) as temporary, writer(temporary, args.output.lower(), [*headers, *names], numbers, comments) as add:
        row = 0
        for table, keys in zip(tables, numbered, strict=True):
            places = [keys.index(key) if key in keys else -1 for key in inputs]
            for cells in table.rows():
                given = [cells[at] if at >= 0 else "" for at in places]
                if len(tables) > 1:
                    given.append(table.path.name)
                reason = [why.get(row, "")] if args.invalid == "keep" else []
                add([*given, *(float(column[row]) for column in values), *reason])
                row += 1
    if values and row != len(values[0]):
        raise InputError("the tables changed while they were read; start again")


def _numbered(columns: list[str]) -> list[tuple[str, int]]:
    """Each column's name, and how often it stood before: names may be empty, or there twice."""
    return [(name, columns[:at].count(name)) for at, name in enumerate(columns)]


def _new(name: str, taken: dict) -> str:
    """The name, or the next that the input has no column for."""
    number, wanted = 2, name
    while wanted in taken:
        wanted, number = f"{name}_{number}", number + 1
    taken[wanted] = None
    return wanted
