"""What the commands share: arguments, loading the model, output paths, the words of the summary."""

import argparse
import os
import re
import sys
import warnings
from pathlib import Path

from ..console import Stages, check_space, human_bytes, progress  # noqa: F401, the commands'
from ..files.atomic import is_special
from ..formats import quantised
from .numbers import MOST_THREADS, positive

DEMO = "esm1b_t6_demo"
_LISTED = 10
MEANINGLESS = "random weights: these numbers mean nothing"


class InputError(Exception):
    """Something the user gave cannot be used; the message is one sentence that says what to do."""


def add_model(parser: argparse.ArgumentParser, *, several: bool = False, dtype: str = "float32") -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        nargs="+" if several else None,
        default=[DEMO] if several else DEMO,
        metavar="NAME|PATH",
        help="esm1b_t33_650M_UR50S, facebook/esm-1b, esm1v_t33_650M_UR90S_1 ... 5; a fair-esm .pt file, a Hugging Face "
        "folder or a file of esm-fast convert; or random:NAME[:seed] (default: %(default)s, which comes with the "
        "package: small, for trying out; docs/esm1b_t6_demo.md says what it has learned)",
    )
    group.add_argument(
        "--dtype",
        default=dtype,
        choices=("auto", "float32", "bfloat16", "float16", *quantised()),
        help="auto: bfloat16 on CPUs and GPUs that multiply it natively, float16 on V100 and T4, else float32; "
        "docs/benchmarks.md states their errors (default: %(default)s)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s: a GPU)")
    group.add_argument("--backend", help="insist on a backend; esm-fast info lists them (default: the fastest)")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: one per core)")


def add_batch_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-tokens", type=positive, metavar="N", help="tokens in one batch (default: 4096, on a GPU 16384)"
    )


def add_policies(parser: argparse.ArgumentParser, overlength: tuple[str, ...]) -> None:
    group = parser.add_argument_group("policies", "What to do with records that cannot go through as they are.")
    choices = {
        "unknown": (("error", "x", "skip"), "residues ESM-1b does not know; x reads them as X"),
        "empty": (("error", "skip"), "records without residues"),
        "duplicates": (("keep", "skip", "error"), "ids seen before; keep stores the second P12345 as P12345_2"),
        "overlength": (overlength, "proteins too long for the model, over 1022 residues"),
        "gaps": (("error", "remove", "keep"), "'-' and '.', as alignments have them; keep computes them as tokens"),
    }
    for name, (values, text) in choices.items():
        group.add_argument(f"--{name}", default=values[0], choices=values, help=f"{text} (default: %(default)s)")
    add_max_record(group)


def add_max_record(group) -> None:
    group.add_argument(
        "--max-record",
        type=positive,
        default=10_000_000,
        metavar="N",
        help="most bytes of a record, header and residues; one that has more ends the run (default: %(default)s)",
    )


def ingest_of(args: argparse.Namespace, max_residues: int, **more):
    """The Ingest of --unknown, --empty, --duplicates, --overlength, --gaps and --max-record; more: its other fields."""
    from ..sequences.ingest import Ingest
    from ..sequences.tokenize import Policy

    policy = Policy(args.unknown, args.empty, args.overlength, max_residues, args.gaps)
    return Ingest(policy, duplicates=args.duplicates, max_record=args.max_record, **more)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def architecture(text: str) -> tuple[int, int]:
    """A GPU's compute capability: 8.0, 80 or sm_80 -> (8, 0)."""
    found = re.fullmatch(r"(?:sm_?)?([0-9]{1,3}?)\.?([0-9])a?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no compute capability, such as 8.0 or sm_80")
    return int(found[1]), int(found[2])


def output_path(text: str, force: bool) -> Path:
    """The path of a file to write. Raises InputError before any work is lost."""
    path = Path(text)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; make it first")
    if path.exists() and not force and not is_special(path):  # a device or a pipe, as >(gzip) is, loses nothing
        raise InputError(f"{path} exists; give --force to overwrite it, or another -o")
    return path


def dtype_of(args: argparse.Namespace) -> str:
    """--dtype; for auto the fastest type whose error is known, which is printed."""
    if args.dtype != "auto":
        return args.dtype
    from ..inference.dtype import fastest

    require_device(args.device)
    chosen, why = fastest(args.model, args.device, args.backend)
    print(f"dtype     {chosen} ({why})", file=sys.stderr)
    return chosen


def load_model(name, *, device="auto", dtype="auto", backend=None, threads=None, regression=None, contacts=True):
    """The model, packed where the CPU kernels are going to run; warnings and BackendError become lines for the user.

    regression: a file, for contacts; contacts: whether to warn of a model that has none.
    """
    from ..inference.embed import embed
    from ..inference.load import load
    from ..ops import BackendError
    from ..weights import NoRegressionWarning

    set_threads(threads)
    if isinstance(name, str) and is_random(name):
        warn_random(name)
    require_device(device)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if not contacts:
                warnings.simplefilter("ignore", NoRegressionWarning)
            model, _ = load(name, device=device, dtype=dtype, backend=backend, packed="auto", regression=regression)
        if backend:
            next(embed(model, ["M"]))  # one that cannot run here says so now, not after the input is read
    except BackendError as error:
        raise InputError(str(error)) from None
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return model


def require_device(device: str) -> None:
    """Raises InputError for a device that does not compute here."""
    import torch

    if device in ("auto", "cpu"):
        return
    try:
        torch.ones(2, device=device).sum().item()
    except Exception as error:  # of many types, from a torch without CUDA to a device that is a module's name
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(
            f"device {device!r} cannot be used: {reason}; give auto, cpu, cuda, or the number of a GPU, cuda:1"
        ) from None


def require_contacts(model, name: str) -> None:
    """Raises InputError for a model without a fitted contact regression."""
    from ..models.family import of_name, published

    try:
        model.contact_head.require_fitted()
    except ValueError as error:
        with_one = [known for known in published() if known != DEMO and of_name(known).has_regression(known)]
        raise InputError(f"{name}: {error}. These come with one: {', '.join(with_one)}") from None


def set_threads(count: int | None) -> None:
    """As many for torch and for our kernels. Raises InputError before a machine is asked for more than it can start."""
    if count is None:
        return
    if count > MOST_THREADS:
        raise InputError(
            f"--threads is {count}; give at most {MOST_THREADS}, and no more than the {cores()} cores here"
        )
    import torch

    from .. import _C

    _C.set_threads(count)
    torch.set_num_threads(count)


def is_random(name: str) -> bool:
    return name.startswith("random:")


def warn_random(name: str) -> None:
    text = f"{name} HAS RANDOM WEIGHTS: ITS NUMBERS MEAN NOTHING. Give --model for real ones."
    print(f"{'!' * len(text)}\n{text}\n{'!' * len(text)}", file=sys.stderr)


def tell_result(args: argparse.Namespace, counts, seconds: float, model: str, dtype: str) -> None:
    """The part of a summary that every command with FASTA input has: nothing that happened to a record is left out."""
    from ..inference.dtype import line

    report, skipped = counts.report, counts.skipped | {"already done": counts.done}
    listed = [f"            record {number + 1}, {name!r}: {why}" for number, name, why in report.skipped[:_LISTED]]
    more = sum(skipped.values()) - counts.done - len(listed)
    args.summary.say(
        f"proteins  {counts.proteins:,} of {report.records:,} records",
        f"residues  {counts.residues:,} in {seconds:.1f} s: {counts.residues / seconds:,.0f} residues/s",
        f"skipped   {', '.join(f'{count:,} {what}' for what, count in skipped.items())}",
        *listed,
        *([f"            and {more:,} more"] if more else []),
        f"changed   {', '.join(f'{count:,} {what}' for what, count in counts.changed.items())}",
        f"model     {model}" + (f"  ({MEANINGLESS.upper()})" if is_random(model) else ""),
        line(dtype, getattr(args, "dtype", dtype)),
        proteins=counts.proteins,
        records=report.records,
        residues=counts.residues,
        compute_seconds=round(seconds, 3),
        skipped=skipped,
        changed=counts.changed,
        model=model,
        dtype=dtype,
    )


def as_flags(message: str) -> str:
    """The library's advice in the command's words: unknown='x' is --unknown x."""
    message = re.sub(r"\bmax_record=N", "--max-record N", message)
    return re.sub(r"\b(unknown|empty|overlength|duplicates|gaps)='(\w+)'", r"--\1 \2", message)
