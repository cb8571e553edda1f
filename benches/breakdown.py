"""Where our time goes: seconds per op of a run, and of all threads together per phase inside the CPU kernels."""

import time
from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import torch
from common import Job, Run, Size, token_counts
from tables import markdown

from esm_fast import _C
from esm_fast.ops.registry import Op

COLUMNS = {"where": "{}", "s": "{:.3f}", "share": "{:.1%}", "GFLOP/s": "{:.0f}", "share of raw": "{:.0%}"}
PHASES = {
    "gemm": "threads: GEMMs and their epilogues",
    "attention": "threads: attention",
    "norm": "threads: layer norms",
}


class Breakdown(NamedTuple):
    seconds: float  # of the whole run
    ops: Counter  # seconds of each op, the rest of the run excluded
    phases: dict[str, float]  # seconds of all threads together in each phase of the kernels


def break_down(run: Run, job: Job) -> Breakdown:
    """One run under clocks."""
    _C.set_clocks(True)
    try:
        with clocked_ops() as ops:
            begin = time.perf_counter()
            run(job)
            seconds = time.perf_counter() - begin
        return Breakdown(seconds, ops, _C.phases())
    finally:
        _C.set_clocks(False)


@contextmanager
def clocked_ops():
    """Yields a Counter of seconds that grows with every op called meanwhile."""
    seconds, call = Counter(), Op.__call__

    def clocked(op, *args, **kwargs):
        begin = time.perf_counter()
        try:
            return call(op, *args, **kwargs)
        finally:
            seconds[op.name] += time.perf_counter() - begin

    Op.__call__ = clocked
    try:
        yield seconds
    finally:
        Op.__call__ = call


def gemm_share(found: Breakdown, size: Size, job: Job, raw: float) -> float | None:
    """The share of the raw rate that the GEMMs reach while they run, epilogues included; None without our kernels."""
    gemm, _ = size.flops(token_counts(job.proteins))
    spent = found.phases["gemm"]
    return gemm * torch.get_num_threads() / spent / raw if spent else None


def table(found: Breakdown, size: Size, job: Job, raw: float) -> str:
    """The run by ops, and once more by what its threads did: their seconds are divided by how many there are."""
    gemm, attention = size.flops(token_counts(job.proteins))
    ffn = gemm * size.ffn_embed_dim / (2 * size.embed_dim + size.ffn_embed_dim)
    work = {"pre_ln_attention": gemm - ffn + attention, "gelu_ffn": ffn, "transformer_stack": gemm + attention}
    lines = [_line(f"op: {name}", spent, found.seconds, raw, work.get(name)) for name, spent in found.ops.items()]
    lines.append(_line("no op: input, packing, output", found.seconds - found.ops.total(), found.seconds, raw))
    work = {"gemm": gemm, "attention": attention}
    seconds = {name: spent / torch.get_num_threads() for name, spent in found.phases.items()}
    lines += [_line(PHASES[name], seconds[name], found.seconds, raw, work.get(name)) for name in PHASES]
    lines.append(_line("threads: waiting, and all else", found.seconds - sum(seconds.values()), found.seconds, raw))
    return markdown([*lines, _line("the whole run", found.seconds, found.seconds, raw, gemm + attention)], COLUMNS)


def _line(where: str, seconds: float, whole: float, raw: float, flops: float | None = None) -> dict:
    line = {"where": where, "s": seconds, "share": seconds / whole}
    if flops and seconds:
        line |= {"GFLOP/s": flops / seconds / 1e9, "share of raw": flops / seconds / raw}
    return line
