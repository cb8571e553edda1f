"""esm-fast bench: what this machine embeds in a second, by type and backend, and how long a file would take."""

import argparse
import statistics
import time
from pathlib import Path

from .common import DEMO, InputError, is_random, load_model, progress, set_threads
from .info import machine_lines
from .numbers import above_0, positive

NAME = "bench"
ORDER = 53
HELP = "this machine's residues/s by type and backend; how long a file would take"
DESCRIPTION = """\
Embeds proteins in each type that this machine computes, by the kernels chosen here and by plain
PyTorch (the backend "reference"), and prints the residues of each second: the median of three
rounds. With FASTA its own proteins are taken, as many as fit the time, and what the whole file
would take is estimated from their rate; else proteins as long as UniProt's are made up. What it
prints first belongs into a report of a fault."""
EXAMPLES = """\
  esm-fast bench
  esm-fast bench proteome.fasta.gz --model esm1b_t33_650M_UR50S --seconds 10
  esm-fast bench --json > bench.json
"""
_TYPES = ("float32", "bfloat16", "float16", "int8")
_ROUNDS = 3
_LEAST, _MOST = 4, 2000  # proteins in a round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fasta", nargs="?", metavar="FASTA", help="proteins to time, and to estimate the whole file of")
    parser.add_argument("--model", default=DEMO, metavar="NAME|PATH", help="see esm-fast embed --help (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s: a GPU)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: one per core)")
    parser.add_argument(
        "--seconds", type=above_0, default=1.0, metavar="S", help="of a round of each (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    set_threads(args.threads)
    proteins, total = _proteins(args.fasta)
    facts = machine_lines()
    args.summary.say(*facts, f"\nmodel     {args.model}, {len(proteins):,} proteins to choose from")
    rows, errors = [], []
    kinds = [(dtype, None) for dtype in _TYPES] + [(dtype, "reference") for dtype in _TYPES[:2]]
    for dtype, backend in progress(len(kinds), "runs", iterable=kinds, unit_scale=False, leave=False):
        rows.append({"dtype": dtype, "backend": backend or "chosen here"})
        try:
            model = load_model(args.model, device=args.device, dtype=dtype, backend=backend)
        except (InputError, ValueError) as error:
            rows[-1]["why_not"] = " ".join(str(error).split())
            errors.append(error)
            continue
        rows[-1] |= _timed(model, proteins, args.seconds)
        del model  # one at a time: all together are five times the model's file
        if args.fasta:
            rows[-1]["estimated_seconds"] = total / rows[-1]["residues_per_second"]
    if len(errors) == len(rows):
        raise errors[0]
    args.summary.say(machine=facts, model=args.model, residues=total, runs=rows)
    _tell(rows, args, total)


def _tell(rows: list[dict], args: argparse.Namespace, total: int) -> None:
    say = args.summary.say
    whole = f"  {Path(args.fasta).name}, estimated" if args.fasta else ""
    say(f"\n{'type':10}{'backend':14}{'residues/s':>12}{'best':>12}{whole}")
    for row in rows:
        begin = f"{row['dtype']:10}{row['backend']:14}"
        if "why_not" in row:
            say(f"{begin}{'-':>12}  {row['why_not']}")
            continue
        taken = f"  {_words(row['estimated_seconds'])}" if args.fasta else ""
        say(f"{begin}{row['residues_per_second']:12,.0f}{row['best']:12,.0f}{taken}")
    if args.fasta:
        say(f"\n{args.fasta} has {total:,} residues; the estimates leave out reading and writing")
    if is_random(args.model):
        say("The weights are random: the times are real, the embeddings are not")
    args.summary.time()


def _words(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _rate(model, proteins: list[str]) -> float:
    from ..inference.embed import embed

    begin = time.perf_counter()
    for _ in embed(model, proteins, unknown="x", empty="skip", overlength="window"):
        pass
    return sum(map(len, proteins)) / (time.perf_counter() - begin)


def _timed(model, proteins: list[str], seconds: float) -> dict:
    """Of as many of the proteins, evenly out of all, as take about `seconds`. Two short runs find how many that is, of
    which the first only warms up."""
    few = _evenly(proteins, _LEAST)
    _rate(model, few)
    mean = sum(map(len, proteins)) / len(proteins)
    chosen = _evenly(proteins, int(min(_MOST, max(_LEAST, _rate(model, few) * seconds / mean))))
    rates = [_rate(model, chosen) for _ in range(_ROUNDS)]
    return {"proteins": len(chosen), "residues_per_second": statistics.median(rates), "best": max(rates)}


def _evenly(proteins: list[str], count: int) -> list[str]:
    count = min(count, len(proteins))
    return [proteins[(2 * i + 1) * len(proteins) // (2 * count)] for i in range(count)]


def _proteins(fasta: str | None) -> tuple[list[str], int]:
    """Proteins to choose from, and the residues of all."""
    import numpy as np

    if fasta is None:
        generator = np.random.default_rng(0)
        # Lengths of UniProt's reviewed proteins: median about 290, mean about 360.
        lengths = np.clip(generator.lognormal(np.log(290), 0.65, _MOST), 30, 1022).astype(int)
        made = ["".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), length)) for length in lengths]
        return made, int(lengths.sum())
    from ..sequences.fasta import read_fasta

    kept, total, step, seen = [], 0, 1, 0
    for records in read_fasta(fasta):
        ends = records.offsets
        total += int(ends[-1] - ends[0])
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            if seen % step == 0 and end > start:
                kept.append(records.residues[start:end].tobytes().decode("ascii", "replace"))
            seen += 1
            if len(kept) > 2 * _MOST:  # a file of any size in bounded memory, each of its parts alike
                kept, step = kept[::2], 2 * step
    if not kept:
        raise InputError(f"{fasta} has no residues")
    return kept, total
