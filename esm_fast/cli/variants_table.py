"""esm-fast variants --variants: tables in, the same rows and columns out, with scores."""

import argparse
import sys
import time
from pathlib import Path

from ..files.atomic import atomic
from .common import InputError, progress
from .dataset import SOME_FAILED
from .variants_models import job_factory, listed, protein_lines, summary

_WHY = "not_scored_because"


def score_tables(args: argparse.Namespace, out: Path, proteins: dict[str, str], report, models) -> int:
    from ..variants.formats import layout_of, opened
    from ..variants.rows import Collection

    if args.output.lower().endswith((".png", ".html")) or args.format or args.png:
        raise InputError("heat maps and --format are for all substitutions; leave --variants out for them")
    tables = [opened(Path(path)) for path in args.variants]
    layouts = [layout_of(table, args.variant_col, args.protein_col) for table in tables]
    if not proteins and any(layout.pairs is None for layout in layouts):
        raise InputError("give the FASTA of the wild types: a table has none, unless it has wt_seq and mut_seq")
    rows, job_of = Collection(proteins, protein_column=args.protein_col is not None), job_factory(args)
    for table, layout in zip(tables, layouts, strict=True):
        rows.add(table.columns, layout, table.rows())
    found = rows.check(job_of, args.offset)
    problems = rows.all_problems()
    if problems and args.invalid == "error":
        raise InputError(_advice(rows.explain()))
    start = time.perf_counter()
    columns = _columns(args, rows, job_of, models)
    why = {problem.row: str(problem.error) for problem in problems}
    _write(args, out, tables, columns, why)
    lines = protein_lines(proteins, report) if report else [f"proteins  {len(rows.groups):,}"]
    offsets = {group.offset for group in rows.groups.values() if not group.pairs}
    if args.offset == "auto" and offsets:
        lines.append(f"offset    {', '.join(map(str, sorted(offsets)[:5]))} (found)")
    summary(args, models, lines, found, out, time.perf_counter() - start)
    if problems:
        print("\n".join([f"not scored {len(problems):,} rows", *listed(problems)]), file=sys.stderr)
    return SOME_FAILED if problems else 0


def _advice(message: str) -> str:
    return message.replace("offset=", "--offset ") + "; --invalid keep leaves such rows without a score"


def _columns(args: argparse.Namespace, rows, job_of, models) -> dict[str, object]:
    """Name -> a score a row, of each model and combined; for pll also the wild type's and the difference."""
    from ..variants.rows import scores_of, wild_types_of

    groups, made, bases = list(rows.groups.values()), [], []
    is_pll = args.strategy in ("pll", "pseudo-ppl", "pseudo-log-likelihood")
    bar = None
    for model, budget in models:
        if bar is None:
            bar = progress(len(args.model) * _tokens(groups, job_of, model), unit="tokens")
        made.append(scores_of(groups, rows.count, job_of, model, budget, bar.update))
        if is_pll:
            bases.append(wild_types_of(groups, rows.count, job_of, model, budget, bar.update))
    bar.close()
    names = [*models.names, *([models.combined] if models.combined else [])]
    columns = dict(zip(names, models.combine(made), strict=True))
    if is_pll:
        for name, base in zip(names, models.combine(bases), strict=True):
            columns |= {f"{name}_wild_type": base, f"{name}_difference": columns[name] - base}
    return columns


def _tokens(groups, job_of, model) -> int:
    """What one model has to compute."""
    jobs = ((job_of(group.protein), group.checked.variants) for group in groups)
    return sum(plan.tokens for job, variants in jobs for _, plan in job.plans(model, variants))


def _write(args: argparse.Namespace, out: Path, tables, scores: dict, why: dict[int, str]) -> None:
    """The tables' rows one after the other; of several tables, the columns of all and the file's name."""
    from ..variants.tables import writer

    inputs = list(dict.fromkeys(name for table in tables for name in table.columns))
    if len(tables) > 1:
        inputs.append("file")
    taken = dict.fromkeys(inputs)
    names = [_new(name, taken) for name in [*scores, *([_WHY] if args.invalid == "keep" else [])]]
    numbers, values = set(names[: len(scores)]), list(scores.values())
    comments = tables[0].comments if len(tables) == 1 else []
    with atomic(out) as temporary, writer(temporary, args.output.lower(), [*inputs, *names], numbers, comments) as add:
        row = 0
        for table in tables:
            places = [table.columns.index(name) if name in table.columns else -1 for name in inputs]
            for cells in table.rows():
                given = [cells[at] if at >= 0 else "" for at in places]
                if len(tables) > 1:
                    given[-1] = table.path.name
                reason = [why.get(row, "")] if args.invalid == "keep" else []
                add([*given, *(float(column[row]) for column in values), *reason])
                row += 1
    if values and row != len(values[0]):
        raise InputError("the tables changed while they were read; start again")


def _new(name: str, taken: dict) -> str:
    """The name, or the next that the input has no column for."""
    number, wanted = 2, name
    while wanted in taken:
        wanted, number = f"{name}_{number}", number + 1
    taken[wanted] = None
    return wanted
