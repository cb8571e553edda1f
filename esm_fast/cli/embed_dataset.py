"""esm-fast embed -o OUT/: a data set, planned, committed unit by unit, and finished."""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from .common import (
    MEANINGLESS,
    InputError,
    as_flags,
    check_space,
    dtype_of,
    human_bytes,
    is_random,
    load_model,
    progress,
)
from .dataset import SOME_FAILED, STOPPED, UNIT_RESIDUES, UNIT_RESIDUES_KEPT, plan_lines, require_pyarrow, size_of

_ROW_BYTES = 64  # digest, length, status and page headers


def embed_dataset(args: argparse.Namespace) -> int:
    out = folder_of(args)
    require_pyarrow()
    from ..dataset import ranks
    from ..dataset.compute import Computer
    from ..dataset.units import has_numbers

    share = ranks.share(args.shard)
    if share.count > 1:
        print(f"share     {share.rank} of {share.count} ({share.said_by})", file=sys.stderr)
    try:
        with _stop_signals() as check_stopped:
            load = loader(args)
            dtype = dtype_of(args)
            model = load(dtype=dtype)
            plan = make_plan(out, args, model, dtype, check_stopped)
            done = _work(plan, share, Computer(model, plan.fields, exact(plan, load), check_stopped), args.log_json)
            seconds, status = done.seconds, done.status
            if share.count == 1:
                status = _finished(plan, check_stopped)
    except _StoppedError:
        print(f"stopped   the same command goes on where this one left {out}", file=sys.stderr)
        return STOPPED
    print("\n".join(_summary(plan, done, seconds, share)))
    failed = {word: count for word, count in status.items() if not has_numbers(word)}
    for word, count in failed.items():
        print(f"failed    {count:,} {word}", file=sys.stderr)
    return SOME_FAILED if failed else 0


def folder_of(args: argparse.Namespace) -> Path:
    out = Path(args.output)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for a data set, or a name that ends in .h5 for one file")
    if not out.absolute().parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist; make it first")
    if args.force:
        raise InputError(f"--force is for one file; to start a data set again, remove {out} first")
    if args.pool == "per-residue":
        raise InputError("a data set keeps residues beside the pooled numbers: give --residues, and --pool mean or cls")
    return out


def loader(args: argparse.Namespace) -> Callable:
    """Loads the model of these arguments, in the type it is given. Another process can be sent it."""
    return partial(load_model, args.model, device=args.device, backend=args.backend, threads=args.threads)


def make_plan(out: Path, args: argparse.Namespace, model, dtype: str, on_read: Callable = lambda *_: None):
    """The plan of these arguments, new or as it is in the folder already."""
    from ..dataset import fingerprint
    from ..dataset.planner import make_or_resume
    from ..dataset.worker import prepare_folders
    from ..inference.embed import layer_numbers, token_budget
    from ..sequences.fasta import FastaError
    from ..sequences.tokenize import Policy

    policy = Policy(args.unknown, args.empty, args.overlength, model.config.max_residues)
    size = args.unit_residues or (UNIT_RESIDUES_KEPT if args.residues else UNIT_RESIDUES)
    fields = {
        "model": fingerprint.of_model(args.model),
        "layers": layer_numbers(model, args.layers),
        "width": model.config.embed_dim,
        "max_residues": model.config.max_residues,
        "pool": args.pool,
        "residues": args.residues,
        "store": args.store,
        "dtype": dtype,
        "backend": args.backend or "auto",
        "batch_tokens": token_budget(model, args.batch_tokens),
        "unit_residues": size,
        **{name: getattr(args, name) for name in ("unknown", "empty", "duplicates", "overlength")},
        **fingerprint.of_versions(model.device),
    }
    info = {"model": args.model, "sources": [Path(name).name for name in args.fasta]}
    if is_random(args.model):
        info["warning"] = MEANINGLESS
    try:
        plan = make_or_resume(out, args.fasta, fields, info, policy, on_read)
    except FastaError as error:
        raise InputError(as_flags(str(error))) from None
    prepare_folders(plan)
    return plan


def _work(plan, share, compute: Callable, log_json: str | None):
    """What this process committed."""
    from ..dataset.worker import Progress, remaining, work

    units, sizes = remaining(plan, share.rank, share.count), plan.info["unit_residues"]
    mine = sizes[share.rank :: share.count]
    total, todo = sum(mine), sum(sizes[unit] for unit in units)
    require_space(plan, units)
    done = Progress(already_done=len(mine) - len(units))
    with _log(log_json) as log, progress(total, done=total - todo) as bar:

        def note(committed) -> None:
            done.add(committed)
            bar.update(committed.residues)
            log({"event": "unit"} | asdict(committed))

        work(plan, units, compute, note)
        bar.update(total - bar.n)  # units that another process did meanwhile
    return done


class _StoppedError(Exception):
    """A signal asked for an end."""


@contextmanager
def _stop_signals() -> Iterator[Callable]:
    """Yields what raises _StoppedError once SIGTERM or SIGUSR1 came, which schedulers send ahead of the end, or SIGHUP.

    A second signal acts at once. One that is ignored (nohup) stays so.
    """
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    stopped, numbers = threading.Event(), [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number, _frame):
        stopped.set()
        signal.signal(number, before[number])

    def check(*_) -> None:
        if stopped.is_set():
            raise _StoppedError

    for number in numbers:
        signal.signal(number, note)
    try:
        yield check
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def exact(plan, load: Callable) -> Callable:
    """Loads the model in float32 when it is first needed; gives None where there is nothing more exact."""
    loaded: list = []

    def once():
        if not loaded:
            try:
                loaded.append(load(dtype="float32") if plan.fields["dtype"] != "float32" else None)
            except (ValueError, InputError):  # the file holds only packed halves, or the backend takes nothing else
                loaded.append(None)
        return loaded[0]

    return once


def require_space(plan, units: list[int]) -> None:
    """Raises InputError where the disk cannot hold about what these units will take."""
    fields, info = plan.fields, plan.info
    item = {"float32": 4, "float16": 2}[fields["store"]] * fields["width"] * len(fields["layers"])
    rows = sum(info["unit_rows"][unit] for unit in units) * (item + _ROW_BYTES)
    kept = sum(info["unit_residues"][unit] for unit in units) * item if fields["residues"] else 0
    check_space(plan.folder, rows + kept)


@contextmanager
def _log(path: str | None) -> Iterator[Callable[[dict], None]]:
    if path is None:
        yield lambda event: None
        return
    with ExitStack() as stack:
        file = sys.stderr if path == "-" else stack.enter_context(open(path, "a"))
        yield lambda event: print(json.dumps({"time": round(time.time(), 3)} | event), file=file, flush=True)


def _finished(plan, check_stopped: Callable) -> dict[str, int]:
    """How many sequences have which status. Raises InputError naming what is wrong or missing."""
    from ..dataset.verify import finish

    with progress(plan.info["residues"]) as bar:
        bar.set_description("verifying")

        def on_unit(residues: int) -> None:
            check_stopped()
            bar.update(residues)

        _, found = finish(plan.folder, on_unit)
    if problems := found.problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(
            f"{plan.folder} is not complete: {'; '.join(problems[:3])}{more}. Remove the files named and run the same "
            "embed command again"
        )
    return found.status


def _summary(plan, done, seconds: float, share) -> list[str]:
    end = (
        [
            "",
            "Open it in Python:",
            "  import esm_fast",
            f"  embeddings = esm_fast.open({str(plan.folder)!r})",
            "  embeddings[0], embeddings['P12345']",
        ]
        if share.count == 1
        else [f"next      when all {share.count} shares are done: esm-fast finish {plan.folder}"]
    )
    return [
        *plan_lines(plan),
        f"residues  {done.residues:,} in {seconds:.1f} s: {done.residues / seconds:,.0f} residues/s",
        f"units     {done.units:,} committed, {done.already_done:,} were there already",
        f"output    {plan.folder} ({human_bytes(size_of(plan.folder))})",
        *end,
    ]
