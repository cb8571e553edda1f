"""What people see of a data set being made: a bar a stage, a JSON line a unit, the summary."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

from ..console import human_bytes, progress, size_of
from ..console.streams import printable
from .build import MEANINGLESS, Built
from .units import has_numbers
from .worker import Progress

SOME_FAILED, STOPPED = 3, 75  # exit codes
_EXACT = "--dtype float32 and another folder give the reference's numbers"


class Watch:
    """Called with a Progress, it moves the bar of its stage and notes a unit's line.

    log: a file that JSON lines are added to, "-" for standard error, None for none. check: called first; may raise.
    """

    def __init__(self, log: str | None = None, check: Callable[[], None] = lambda: None):
        self._path, self._check = log, check
        self._bar, self._stage = None, "planning"

    def __enter__(self):
        self._stack = ExitStack()
        self._log = None
        if self._path == "-":
            self._log = sys.stderr
        elif self._path is not None:
            self._log = self._stack.enter_context(open(self._path, "a", encoding="utf-8"))
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()
        self._stack.close()

    def __call__(self, now: Progress) -> None:
        if now.last is not None and self._log is not None:
            event = {"time": round(time.time(), 3), "event": "unit"} | asdict(now.last)
            try:
                print(json.dumps(event), file=self._log, flush=True)
            except OSError as error:
                error.filename = self._path
                raise
        self._check()
        if now.stage != self._stage:
            if self._bar is not None:
                self._bar.close()
            self._stage, self._bar = now.stage, progress(now.total, done=now.done)
            if now.stage == "verifying":
                self._bar.set_description("verifying")
        elif self._bar is not None:
            self._bar.update(now.done - self._bar.n)


def plan_lines(plan) -> list[str]:
    info, settings = plan.info, plan.settings
    expected = info["requested"] - sum(info["skipped"].values())
    return [
        f"proteins  {expected:,} of {info['requested']:,} records, {info['sequences']:,} distinct sequences",
        f"skipped   {', '.join(f'{count:,} {what}' for what, count in info['skipped'].items())}",
        f"changed   {', '.join(f'{count:,} {what}' for what, count in info['changed'].items())}",
        f"model     {printable(info['model'])}" + (f"  ({MEANINGLESS.upper()})" if "warning" in info else ""),
        f"dtype     {settings.dtype}" + (f" ({_EXACT})" if settings.dtype in ("bfloat16", "float16") else ""),
        f"layers    {' '.join(map(str, settings.layers))} ({settings.pool}{', residues' * settings.residues}, "
        f"stored as {settings.store})",
    ]


def summary(built: Built, size: int) -> list[str]:
    plan, done, share = built.plan, built.progress, built.share
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
        f"residues  {done.residues:,} in {built.seconds:.1f} s: {done.residues / built.seconds:,.0f} residues/s",
        f"units     {done.units:,} committed, {done.already_done:,} were there already",
        f"output    {plan.folder} ({human_bytes(size)})",
        *end,
    ]


def plan_facts(plan) -> dict:
    info, settings = plan.info, plan.settings
    found = {"proteins": info["requested"] - sum(info["skipped"].values()), "records": info["requested"]}
    found |= {"sequences": info["sequences"], "skipped": info["skipped"], "changed": info["changed"]}
    found |= {"model": info["model"], "dtype": settings.dtype, "layers": list(settings.layers), "pool": settings.pool}
    return found | {"store": settings.store, "output": str(plan.folder)}


def facts(built: Built) -> dict:
    """What `summary` says, as values by their names."""
    done, share = built.progress, built.share
    found = {"residues": done.residues, "compute_seconds": round(built.seconds, 3), "units": done.units}
    found |= {"units_already_done": done.already_done, "shares": share.count, "bytes": size_of(built.plan.folder)}
    return plan_facts(built.plan) | found | {"failed": failures(built)}


def failures(built: Built) -> dict[str, int]:
    """Why sequences have no numbers, and how many."""
    return {word: count for word, count in built.status.items() if not has_numbers(word)}


def tell_share(share) -> None:
    if share.count > 1:
        print(f"share     {share.rank} of {share.count} ({share.said_by})", file=sys.stderr)


def tell_end(built: Built, say: Callable[..., None], lines: Callable[..., list[str]] | None = None, **more) -> int:
    """Says lines(built, bytes), the summary unless others are given, and the facts; returns the exit code."""
    found = facts(built)
    say(*(lines or summary)(built, found["bytes"]), **found, **more)
    for word, count in found["failed"].items():
        print(f"failed    {count:,} {word}", file=sys.stderr)
    return SOME_FAILED if found["failed"] else 0
