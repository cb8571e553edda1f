"""esm-fast variants -o OUT/: all substitutions of a proteome as a data set; and --lookup, which reads it."""

import argparse
import sys
from functools import partial
from pathlib import Path

from .common import InputError, load_model, require_device
from .dataset import require_pyarrow


def make_dataset(args: argparse.Namespace) -> int:
    for name in ("variants", "png", "format", "compat", "force"):
        if getattr(args, name):
            raise InputError(f"--{name} is not for data sets, which hold all substitutions; give one file, -o NAME.csv")
    if len(args.model) > 1:
        raise InputError("a data set is of one model; make one for each")
    if len(args.strategy) > 1:
        raise InputError("a data set is of one strategy; make one for each")
    if not args.fasta:
        raise InputError("give the FASTA of the proteins")
    require_pyarrow()
    from ..dataset import ranks, report
    from ..dataset.stopping import StoppedError, stop_signals
    from ..variants.atlas import build_atlas

    require_device(args.device)
    report.tell_share(ranks.share(args.shard))
    (model,) = args.model
    load = partial(load_model, model, device=args.device, backend=args.backend, threads=args.threads)
    same = ("device", "backend", "threads", "batch_tokens", "unit_residues", "unknown", "empty", "duplicates")
    same += ("gaps", "max_record")
    options = {name: getattr(args, name) for name in same} | {"store": args.store or "float16"}
    options |= {"dtype": args.dtype, "strategy": args.strategy[0]}
    try:
        with stop_signals() as check, report.Watch(args.log_json, check) as watch:
            built = build_atlas(
                args.fasta,
                args.output,
                model=model,
                window=args.window,
                shard=args.shard,
                on_progress=watch,
                load=load,
                **options,
            )
    except StoppedError:
        print(f"stopped   the same command resumes where this one left {args.output}", file=sys.stderr)
        return report.STOPPED
    code = report.tell_end(built, args.summary.say, partial(_lines, args), strategy=built.plan.settings.scan)
    args.summary.time()
    return code


def _lines(args: argparse.Namespace, built, size: int) -> list[str]:
    from ..dataset import report

    plan, done, folder = built.plan, built.progress, Path(args.output)
    lines = [line for line in report.plan_lines(plan) if not line.startswith("layers")]
    lines += [
        f"strategy  {plan.settings.scan} (stored as {plan.settings.store})",
        f"residues  {done.residues:,} in {built.seconds:.1f} s: {done.residues / built.seconds:,.0f} residues/s",
        f"units     {done.units:,} committed, {done.already_done:,} were there already",
        f"output    {folder} ({report.human_bytes(size)})",
    ]
    if built.share.count > 1:
        lines.append(f"next      when all {built.share.count} shares are done: esm-fast finish {folder}")
    else:
        lines.append(f"next      esm-fast variants {args.output} --lookup 'P04637 R175H'")
    return lines


def look_up(args: argparse.Namespace) -> int:
    """Prints protein, variant and score for each query."""
    if len(args.fasta) != 1 or not Path(args.fasta[0]).is_dir():
        given = f", and {args.fasta[0]} is none" if len(args.fasta) == 1 else ""
        raise InputError(f"--lookup reads a data set{given}: esm-fast variants FOLDER/ --lookup 'P04637 R175H'")
    if args.output is not None or args.variants:
        raise InputError("--lookup prints scores; leave -o and --variants out")
    require_pyarrow()
    from ..variants.atlas import Atlas, split_query

    atlas, offset = Atlas(args.fasta[0]), args.offset
    if offset == "auto":
        raise InputError("--lookup takes an --offset that is a number")
    found = []
    for query in args.lookup:
        name, variant = split_query(query)
        if name not in atlas:
            raise InputError(f"{args.fasta[0]} has no protein {name!r}")
        found.append({"protein": name, "variant": variant, "score": float(atlas.lookup(name, variant, offset))})
    lines = [f"{each['protein']}\t{each['variant']}\t{each['score']:.4f}" for each in found]
    args.summary.say("protein\tvariant\tscore", *lines, scores=found)
    return 0
