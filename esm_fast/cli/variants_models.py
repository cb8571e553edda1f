"""What the forms of `esm-fast variants` share: the models, one after another, and what is said at the end."""

import argparse
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from ..variants.parse import STANDARD
from .common import dtype_of, is_random, load_model

_LISTED = 5


class Models:
    """The models of the command line, one after another; names for their columns."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.names, self.dtypes = args, [], []
        for path in args.model:
            stem = Path(path).name if Path(path).exists() else path
            name = stem.removesuffix(".safetensors").removesuffix(".pt")
            self.names.append(name if name not in self.names else f"{name}_{self.names.count(name) + 1}")
        self.combined = None if len(self.names) < 2 or args.combine == "none" else args.combine

    def __iter__(self):
        """(model, budget), one in memory at a time."""
        from ..inference.embed import token_budget

        args = self.args
        for path in args.model:
            dtype = dtype_of(argparse.Namespace(**{**vars(args), "model": path}))
            self.dtypes = [dtype, *(other for other in self.dtypes if other != dtype)]
            model = load_model(path, device=args.device, dtype=dtype, backend=args.backend, threads=args.threads)
            yield model, token_budget(model, args.batch_tokens)
            del model

    @property
    def said(self) -> str:
        warning = "  (RANDOM WEIGHTS: THESE NUMBERS MEAN NOTHING)" if any(map(is_random, self.args.model)) else ""
        return ", ".join(self.args.model) + warning

    def combine(self, columns: list):
        """The columns, and their combination where it is asked for."""
        import numpy as np

        how = {"mean": np.mean, "min": np.min}.get(self.combined)
        return [*columns, how(columns, axis=0)] if how else columns


def job_factory(args: argparse.Namespace, strategy: str):
    """The job of a protein's text; jobs are kept, since several models share them."""
    from ..variants.scores import Job

    return cache(partial(Job, strategy=strategy, window=args.window, compat=args.compat))


def tell_proteins(say, proteins: dict[str, str], counts) -> None:
    rare = counts.residues - sum(protein.count(residue) for protein in proteins.values() for residue in STANDARD)
    records, skipped = counts.report.records, counts.skipped
    changed = {what: count for what, count in counts.changed.items() if what != "windowed"}  # of which tell() tells
    lines = [f"proteins  {len(proteins):,} of {records:,} records, {counts.residues:,} residues"]
    if any(skipped.values()):
        lines.append(f"skipped   {', '.join(f'{count:,} {why}' for why, count in skipped.items())}")
    if any(changed.values()):
        lines.append(f"changed   {', '.join(f'{count:,} {what}' for what, count in changed.items())}")
    if rare:
        lines.append(f"rare      {rare:,} residues U, O, B, Z or X, scored against their own token")
    numbers = dict(proteins=len(proteins), records=records, residues=counts.residues)
    say(*lines, **numbers, skipped=skipped, changed=changed)


def tell(args, models: Models, counts: Counter, out: Path, seconds: float) -> None:
    from ..inference.dtype import line

    window = "" if args.window == "auto" else f", windows {args.window}"
    notes = [f"{count:,} {what}" for what, count in counts.items() if count and what != "rows"]
    args.summary.say(
        f"rows      {counts['rows']:,}" + (f": {', '.join(notes)}" if notes else "") + f" in {seconds:.1f} s",
        f"strategy  {', '.join(args.strategy)}{window}{', with the published errors' if args.compat else ''}",
        f"model     {models.said}",
        *(line(dtype, args.dtype) for dtype in models.dtypes),
        rows=counts["rows"],
        counted={what: count for what, count in counts.items() if count and what != "rows"},
        compute_seconds=round(seconds, 3),
        strategy=args.strategy,
        window=args.window,
        model=args.model,
        random_weights=any(map(is_random, args.model)),
        dtype=models.dtypes,
    )
    args.summary.output(out)


def listed(problems, where: Callable[[int], str]) -> list[str]:
    lines = [f"  {where(problem.row)}: {problem.error}" for problem in problems[:_LISTED]]
    return lines + ([f"  and {len(problems) - _LISTED:,} more"] if len(problems) > _LISTED else [])
