"""esm-fast qualify: proves and times every kernel that could run here; what is right and fastest is then chosen."""

import argparse

from .common import InputError, Stages, require_device
from .numbers import above_0, positive

NAME = "qualify"
ORDER = 54
HELP = "prove and time the kernels on this machine, and choose by that"
DESCRIPTION = """\
Holds every kernel that could run here to the reference in float64, at real sizes, checks that its bits
repeat and do not depend on the batch, and times it against the others, in processes of their own: one
that crashes or hangs is not chosen. The verdicts are kept for this device, driver and these versions,
and ops run by them from then on; a data set or a training run that was begun keeps its kernels.
ESM_FAST_VERDICTS is the folder of the verdicts, by default ~/.cache/esm_fast/verdicts, or off."""
EXAMPLES = """\
  esm-fast qualify
  esm-fast qualify --device cuda --dtype bfloat16 --training
  esm-fast qualify --head-dim 20 24 32 64                    # of ESM-2's smaller models as well
  ESM_FAST_VERDICTS=off esm-fast embed proteins.fasta -o out.h5
"""
_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s: a GPU)")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=[], help="(default: all that matter there)")
    parser.add_argument(
        "--head-dim", type=positive, nargs="+", default=[64], metavar="D", help="sizes of heads (default: 64, ESM-1b's)"
    )
    parser.add_argument("--training", action="store_true", help="gradients too")
    parser.add_argument("--limit", type=above_0, default=60.0, metavar="S", help="seconds a kernel (default: 60)")
    parser.add_argument("--again", action="store_true", help="also what crashed or hung before")


def run(args: argparse.Namespace) -> None:
    import torch

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    require_device(device)
    grads = (False, True) if args.training else (False,)
    head_dims = tuple(dict.fromkeys(args.head_dim))
    options = dict(grads=grads, head_dims=head_dims, limit=args.limit, again=args.again)
    tell(args.summary, device, tuple(args.dtype), **options)


def tell(summary, device: str, dtypes: tuple[str, ...], **options) -> None:
    """Qualifies, and says each verdict as it comes and where they lie."""
    from ..inference.qualify import Asked, qualify
    from ..ops import verdicts

    if verdicts.folder() is None:
        raise InputError("ESM_FAST_VERDICTS is off; unset it, or give a folder")
    dtypes = dtypes or (_DTYPES if device.startswith("cuda") else _DTYPES[:2])
    with Stages() as bar:
        found = qualify(Asked(device, dtypes, **options), note=bar.say, watcher=bar)
    changed = [(key, entry) for key, entry in found.items() if entry["winner"] != entry["default"]]
    failed = [(key, b, o) for key, entry in found.items() for b, o in entry["backends"].items() if o[0] != "proven"]
    where = str(verdicts.path_of(verdicts.identity(device)))
    summary.say(
        *(f"changed   {key}: {entry['winner']} runs, not {entry['default']}" for key, entry in changed),
        *(f"failed    {key}, {backend}: {outcome}, {detail}" for key, backend, (outcome, detail) in failed),
        f"qualified {len(found)} of op, type and direction on {device}",
        f"chosen    as before for {len(found) - len(changed)}, otherwise for {len(changed)}",
        f"verdicts  {where}",
        device=device,
        qualified=len(found),
        changed={key: {"runs": entry["winner"], "not": entry["default"]} for key, entry in changed},
        failed=[{"key": str(key), "backend": name, "outcome": list(found)} for key, name, found in failed],
        output=where,
    )
    summary.time()
