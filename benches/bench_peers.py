"""Side by side: full-size ESM-1b on proteins of natural lengths, every peer on the same weights, in one run.

    python benches/bench_peers.py            # everything; about 40 minutes on two cores
    python benches/bench_peers.py --tiny     # seconds: shows that all of it runs, its numbers mean nothing
    python benches/bench_peers.py --peers hf-bf16 esm_fast-bf16 --residues 20000 --rounds 5

Outputs are verified before anything is timed; the peers then take turns, since a shared machine's speed drifts.
docs/benchmarks.md says how to read the result.
"""

import argparse
import json
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from machine import gemm_peak, machine
from peers import PEERS, TINY, Peer, Proteins, Run, Setup, Size, padded_batches, random_state
from tqdm import tqdm

SAMPLE = Path(__file__).parents[1] / "examples" / "uniprot_sample.fasta.gz"
MAX_RESIDUES = 1022
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest error of any element of any mean embedding, in units of the reference embeddings' root mean square. bf16 holds
# 8 bits: its peers reach 0.03 through 33 layers; a wrong mask, order or position is off by 0.3 and more.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
REFERENCES = ("fair-esm-fp32", "hf-fp32")  # the first one installed is the truth
BASELINES = {"x fair-esm fp32": "fair-esm-fp32", "x HF same dtype": "hf-{dtype}"}


@dataclass
class Result:
    """What became of one peer: the problem that keeps it out of the table, or its seconds, one per round."""

    peer: Peer
    problem: str = ""
    error: float | None = None  # the worst of all its runs, in the units of TOLERANCE
    seconds: list[float] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    size = TINY if args.tiny else Size()
    size = replace(size, layers=args.layers or size.layers)
    whole = read(args.fasta)
    proteins = choose(whole, args.residues, args.proteins, args.batch_tokens)
    header = machine() | describe(size, whole, proteins, args)
    print("\n".join(f"{name}: {value}" for name, value in header.items()), flush=True)
    setup = Setup(size, random_state(size, args.seed), args.batch_tokens)
    results, peaks = compare(setup, proteins, args.peers, args.rounds)
    rows = [row(result, results, size, proteins, peaks) for result in results]
    seen = [f"{dtype} {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f}" for dtype, rates in peaks.items() if rates]
    write(rows, header | {"torch's GEMM between the runs, GFLOP/s": ", ".join(seen)}, peaks, args.out)
    return int(any(result.problem.startswith("failed") for result in results))


def parse(argv) -> argparse.Namespace:
    summary, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [peer.name for peer in PEERS]
    add = parser.add_argument
    add("--peers", nargs="+", choices=names, default=names, metavar="PEER", help=f"any of {', '.join(names)}")
    add("--fasta", type=Path, default=SAMPLE, help="proteins to embed (default: the sample in examples/)")
    add("--residues", type=int, default=10000, help="about how many, in whole batches of the file (default 10000)")
    add("--proteins", type=int, help="instead: so many proteins of mixed lengths, which pad more")
    add("--rounds", type=int, default=3, help="timed runs of each peer (default 3)")
    add("--threads", type=int, help="default: torch's, one per core")
    add("--batch-tokens", type=int, default=4096, help="padded tokens a batch, packed for us (default 4096)")
    add("--layers", type=int, help="fewer layers than ESM-1b's 33, for a quicker look")
    add("--tiny", action="store_true", help="a toy model: only to see that everything runs")
    add("--seed", type=int, default=0, help="of the random weights")
    add("--out", type=Path, default=Path("out/peers"), help="folder of the results (default out/peers)")
    return parser.parse_args(argv)


def read(path: Path) -> Proteins:
    """Every protein of a FASTA file, cut to the longest ESM-1b takes."""
    from esm_fast.data import identifier, read_fasta

    if not path.exists():
        raise SystemExit(f"{path} does not exist; give a FASTA file with --fasta")
    return [(identifier(name), residues[:MAX_RESIDUES]) for records in read_fasta(path) for name, residues in records]


def choose(proteins: Proteins, residues: int, count: int | None, batch_tokens: int) -> Proteins:
    """Part of the file, evenly spaced over its lengths: `count` proteins, or about so many residues in whole batches.

    Whole batches are those of the whole file, and so is their padding; single proteins find fewer of their own length.
    """
    by_length = sorted(proteins, key=lambda protein: (-len(protein[1]), protein[0]))
    groups = [[i] for i in range(len(by_length))]
    if count is None:
        groups = list(padded_batches(list(token_counts(by_length)), batch_tokens))
        count = round(residues * len(groups) / sum(len(protein[1]) for protein in proteins))
    count = min(max(1, count), len(groups))
    chosen = [groups[int((i + 0.5) * len(groups) / count)] for i in range(count)]
    return sorted(by_length[i] for group in chosen for i in group)  # by label: gives no order of lengths away


def token_counts(proteins: Proteins) -> np.ndarray:
    return np.array([len(residues) + 2 for _, residues in proteins])


def padding(proteins: Proteins, batch_tokens: int) -> tuple[int, float]:
    """Batches, and the share of their tokens that is padding, for the peers that pad."""
    lengths = token_counts(proteins)
    batches = list(padded_batches(list(lengths), batch_tokens))
    return len(batches), 1 - lengths.sum() / sum(len(batch) * lengths[batch[0]] for batch in batches)


def describe(size: Size, whole: Proteins, proteins: Proteins, args) -> dict[str, str]:
    lengths = token_counts(proteins)
    gemm, attention = size.flops(lengths)
    batches, share = padding(proteins, args.batch_tokens)
    _, share_of_whole = padding(whole, args.batch_tokens)
    residues = f"{lengths.sum() - 2 * len(lengths)} residues ({lengths.min() - 2} to {lengths.max() - 2} a protein)"
    weights = f"random weights (seed {args.seed})"
    return {
        "model": f"{size.layers} layers x {size.embed_dim}, {size.attention_heads} heads, {weights}",
        "work": f"{len(proteins)} of the {len(whole)} proteins of {args.fasta.name}, {residues}; "
        f"{(gemm + attention) / 1e12:.3g} TFLOP, {attention / (gemm + attention):.1%} of them attention",
        "batches": f"sorted by length, up to {args.batch_tokens} tokens each; {batches} for the peers, of which "
        f"{share:.1%} is padding (in batches of all {len(whole)} proteins: {share_of_whole:.1%}); ours are packed",
        "rounds": f"{args.rounds}, after one verified run",
    }


def compare(setup: Setup, proteins: Proteins, names: list[str], rounds: int):
    """Verify the named peers, then time them in turns.

    Returns a `Result` per peer, and {dtype: torch's GEMM rates in FLOP/s, one taken before each timed run}.
    """
    results = [Result(peer) for peer in PEERS if peer.name in names]
    peaks = {dtype: [] for dtype in DTYPES if any(result.peer.dtype == dtype for result in results)}
    with tqdm(total=len(results) * (1 + rounds), unit="run", smoothing=0) as bar:
        runs, truth = verify(setup, proteins, results, bar)
        running = [result for result in results if not result.problem]
        bar.total = len(results) + len(running) * rounds
        for turn in range(rounds):
            for result in running if turn % 2 == 0 else running[::-1]:  # a steady drift of the machine cancels out
                bar.set_description(f"round {turn + 1}: {result.peer.name}")
                peaks[result.peer.dtype].append(gemm_peak(DTYPES[result.peer.dtype]))
                with problems_of(result):
                    begin = time.perf_counter()
                    embeddings = runs[result.peer.name](proteins)
                    result.seconds.append(time.perf_counter() - begin)
                    judge(result, embeddings, truth)
                bar.update()
    return results, peaks


def verify(setup: Setup, proteins: Proteins, results: list[Result], bar) -> tuple[dict[str, Run], np.ndarray]:
    """Build each peer and hold its first output, which also warms it up over all shapes, against the reference's."""
    reference = next((peer for peer in PEERS if peer.name in REFERENCES and not peer.missing()), None)
    if reference is None:
        raise SystemExit("nothing to verify against: pip install 'esm_fast[bench]' for fair-esm and transformers")
    bar.set_description(f"verify: {reference.name}")
    runs = {reference.name: reference.build(setup)}
    truth = runs[reference.name](proteins)
    for result in results:
        peer = result.peer
        bar.set_description(f"verify: {peer.name}")
        if missing := peer.missing():
            result.problem = f"missing: {', '.join(missing)}; pip install 'esm_fast[bench]'"
        elif peer is reference:
            judge(result, truth, truth)
        else:
            with problems_of(result):
                runs[peer.name] = peer.build(setup)
                judge(result, runs[peer.name](proteins), truth)
        bar.update()
    return runs, truth


@contextmanager
def problems_of(result: Result):
    """A peer that breaks is a result, and must not cost the others theirs."""
    try:
        yield
    except Exception as error:
        result.problem = f"failed: {type(error).__name__}: {error}".splitlines()[0]


def judge(result: Result, embeddings: np.ndarray, truth: np.ndarray) -> None:
    """Record a peer's worst error, and that it failed if that is beyond its dtype's tolerance or not a number."""
    if embeddings.shape != truth.shape:
        raise ValueError(f"embeddings of shape {embeddings.shape} instead of {truth.shape}")
    error = float(np.abs(embeddings - truth).max() / np.sqrt(np.mean(truth**2)))
    if not error <= TOLERANCE[result.peer.dtype]:
        raise ValueError(f"error {error:.1e}, allowed {TOLERANCE[result.peer.dtype]:.0e}")
    result.error = max(error, result.error or 0.0)


def row(result: Result, results: list[Result], size: Size, proteins: Proteins, peaks) -> dict:
    """One line of the table, in plain numbers; a peer with a problem has only that."""
    line = {"peer": result.peer.name, "error": result.error, "problem": result.problem, "seconds": result.seconds}
    if result.problem or not result.seconds:
        return line
    lengths, dtype, typical = token_counts(proteins), result.peer.dtype, median(result.seconds)
    line |= {"median s": typical, "min s": min(result.seconds)}
    line["residues/s"] = (lengths.sum() - 2 * len(lengths)) / typical
    line |= {name: ratio(result, baseline.format(dtype=dtype), results) for name, baseline in BASELINES.items()}
    line["share of peak"] = sum(size.flops(lengths)) / typical / max(peaks[dtype])
    return line


def ratio(result: Result, baseline: str, results: list[Result]) -> float | None:
    """How many times faster than the baseline: the median over rounds of the ratio within a round."""
    base = next((r for r in results if r.peer.name == baseline and r.seconds and not r.problem), None)
    return base and median(b / s for b, s in zip(base.seconds, result.seconds, strict=True))


COLUMNS = {
    "peer": "{}", "median s": "{:.2f}", "min s": "{:.2f}", "residues/s": "{:.0f}", "x fair-esm fp32": "{:.2f}",
    "x HF same dtype": "{:.2f}", "share of peak": "{:.0%}", "error": "{:.0e}",
}  # fmt: skip


def markdown(rows: list[dict]) -> str:
    """An aligned Markdown table, and below it why a peer was not timed."""
    lines = [list(COLUMNS)]
    for row in rows:
        values = [form.format(row[name]) if row.get(name) is not None else "" for name, form in COLUMNS.items()]
        if row["problem"]:  # "failed" or "missing" where the times would be
            values[1:] = [row["problem"].split(":")[0], *[""] * (len(values) - 2)]
        lines.append(values)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    notes = [f"- {row['peer']} {row['problem']}" for row in rows if row["problem"]]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in aligned), *(["", *notes] if notes else [])])


def write(rows: list[dict], header: dict[str, str], peaks: dict[str, list[float]], out: Path) -> None:
    """Print the table; write it with the header (Markdown), all numbers (JSON) and a picture (PNG)."""
    table = markdown(rows)
    print(f"\n{table}\n")
    out.mkdir(parents=True, exist_ok=True)
    facts = "\n".join(f"- {name}: {value}" for name, value in header.items())
    (out / "peers.md").write_text(f"{table}\n\n{facts}\n")
    (out / "peers.json").write_text(json.dumps({"header": header, "peaks": peaks, "rows": rows}, indent=1))
    plot(rows, out / "peers.png")
    print(f"written: {', '.join(str(path) for path in sorted(out.glob('peers.*')))}")


def plot(rows: list[dict], path: Path) -> None:
    """Residues per second of each timed peer, the whisker from its median to its best round."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is missing; pip install 'esm_fast[plot]'", file=sys.stderr)
        return
    timed = [line for line in rows if not line["problem"]][::-1]
    speed = [line["residues/s"] for line in timed]
    best = [line["residues/s"] * (line["median s"] / line["min s"] - 1) for line in timed]
    colors = ["tab:orange" if line["peer"].startswith("esm_fast") else "tab:gray" for line in timed]
    figure = Figure(figsize=(7, 0.5 * len(timed) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([line["peer"] for line in timed], speed, color=colors, xerr=[[0] * len(best), best], capsize=3)
    axes.bar_label(bars, [f"{value:.0f}" for value in speed], padding=4)
    axes.margins(x=0.12)
    axes.set_xlabel("residues/s: proteins in, mean embeddings out (median; whisker: best round)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
