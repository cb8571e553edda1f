"""esm-fast embed -o OUT/: a data set, by esm_fast.dataset.build."""

import argparse
import sys
from functools import partial
from pathlib import Path

from .common import InputError, load_model, require_device
from .dataset import require_pyarrow


def embed_dataset(args: argparse.Namespace) -> int:
    options = options_of(args)
    from ..dataset import ranks, report
    from ..dataset.build import build, said_dtype
    from ..dataset.stopping import StoppedError, stop_signals

    require_device(args.device)
    report.tell_share(ranks.share(args.shard))
    load = partial(load_model, args.model, device=args.device, backend=args.backend, threads=args.threads)
    try:
        with stop_signals() as check, report.Watch(args.log_json, check) as watch:
            built = build(said_dtype(options), args.shard, watch, load)
    except StoppedError:
        print(f"stopped   the same command resumes {options.folder}", file=sys.stderr)
        return report.STOPPED
    code = report.tell_end(built, args.summary.say)
    args.summary.time()
    return code


def options_of(args: argparse.Namespace):
    """The Options of these arguments. Raises InputError for what is not for data sets."""
    out = Path(args.output)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for a data set, or a name that ends in .h5 for one file")
    if not out.absolute().parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist; make it first")
    if args.force:
        raise InputError(f"--force is for one file; to start a data set again, remove {out} first")
    if args.pool == "per-residue":
        raise InputError("a data set keeps residues beside the pooled numbers: give --residues, and --pool mean or cls")
    require_pyarrow()
    from ..dataset.build import Options

    same = ("model", "layers", "pool", "residues", "dtype", "store", "device", "backend", "threads", "batch_tokens")
    same += ("unit_residues", "unknown", "empty", "duplicates", "overlength", "gaps", "max_record")
    return Options(args.fasta, out, **{name: getattr(args, name) for name in same})
