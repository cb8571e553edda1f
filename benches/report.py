"""The tables of a side-by-side run, as Markdown, JSON and a picture."""

import json
import sys
from pathlib import Path
from statistics import median

from breakdown import gemm_share, table
from common import Job, Size, token_counts
from peers import OURS
from rounds import Result, Speeds
from tables import aligned, markdown

BASELINES = {"x fair-esm fp32": "fair-esm-fp32", "x HF same dtype": "hf-{dtype}"}
COLUMNS = {
    "peer": "{}", "median s": "{:.4g}", "min s": "{:.4g}", "residues/s": "{:.0f}", "x fair-esm fp32": "{:.2f}",
    "x HF same dtype": "{:.2f}", "share of raw": "{:.0%}", "GEMMs' share": "{:.0%}", "error": "{:.0e}",
    "least cosine": "{:.6f}",
}  # fmt: skip


def row(result: Result, results: list[Result], size: Size, job: Job, speeds: Speeds) -> dict:
    """One line of the table, in plain numbers; a peer with a problem has only that."""
    line = {"peer": result.peer.name, "error": result.error, "least cosine": result.cosine}
    line |= {"problem": result.problem, "seconds": result.seconds}
    if result.problem or not result.seconds:
        return line
    lengths, dtype, typical = token_counts(job.proteins), result.peer.dtype, median(result.seconds)
    line |= {"median s": typical, "min s": min(result.seconds)}
    line["residues/s"] = (lengths.sum() - 2 * len(lengths)) / typical
    line |= {name: ratio(result, baseline.format(dtype=dtype), results) for name, baseline in BASELINES.items()}
    if speeds.raw[dtype]:
        raw = max(speeds.raw[dtype])
        line["share of raw"] = sum(size.flops(lengths)) / typical / raw
        if result.breakdown:
            line["GEMMs' share"] = gemm_share(result.breakdown, size, job, raw)
            line["profile"] = table(result.breakdown, size, job, raw)
    line["x"] = {other.peer.name: ratio(result, other.peer.name, results) for other in results}
    return line


def ratio(result: Result, baseline: str, results: list[Result]) -> float | None:
    """How many times faster than the baseline: the median over rounds of the ratio within a round."""
    base = next((r for r in results if r.peer.name == baseline and r.seconds and not r.problem), None)
    return base and median(b / s for b, s in zip(base.seconds, result.seconds, strict=True))


def ratios(rows: list[dict]) -> str:
    """How many times faster ours are than everyone: a column each of ours, a line each peer."""
    timed = [line for line in rows if "x" in line]
    mine = [line for line in timed if line["peer"].startswith(OURS)]
    if not mine:
        return ""
    cells = [[line["peer"], *(f"{my['x'][line['peer']]:.2f}" for my in mine)] for line in timed]
    return aligned([["times faster than", *(line["peer"] for line in mine)], *cells])


def write(rows: list[dict], header: dict[str, str], speeds: Speeds, out: Path, profile: bool) -> None:
    """Print the tables; write them with the header (Markdown), all numbers (JSON) and a picture (PNG)."""
    profiled = [row for row in rows if profile and "profile" in row]
    profiles = [f"{row['peer']}, one run under clocks:\n\n{row['profile']}" for row in profiled]
    tables = "\n\n".join(filter(None, [markdown(rows, COLUMNS), ratios(rows), *profiles]))
    print(f"\n{tables}\n")
    seen = described(speeds)
    print("\n".join(f"{name}: {value}" for name, value in seen.items()))
    out.mkdir(parents=True, exist_ok=True)
    (out / "peers.md").write_text(f"{tables}\n\n{facts(header | seen)}\n")
    numbers = {"header": header | seen, "speeds": vars(speeds), "rows": rows}
    (out / "peers.json").write_text(json.dumps(numbers, indent=1))
    plot(rows, out / "peers.png")
    print(f"written: {', '.join(str(path) for path in sorted(out.glob('peers.*')))}")


def write_table(rows: list[dict], columns: dict[str, str], header: dict[str, str], out: Path, name: str) -> None:
    """Print a table; write it with the header (Markdown), and all numbers (JSON)."""
    table = markdown(rows, columns)
    print(f"\n{table}\n")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(f"{table}\n\n{facts(header)}\n")
    (out / f"{name}.json").write_text(json.dumps({"header": header, "rows": rows}, indent=1))
    print(f"written: {', '.join(str(path) for path in sorted(out.glob(f'{name}.*')))}")


def facts(header: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in header.items())


def described(speeds: Speeds) -> dict[str, str]:
    titles = {"torch": "torch's GEMM between the runs, GFLOP/s", "raw": "the instruction alone, GFLOP/s"}
    return {
        title: ", ".join(
            f"{dtype} {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f}"
            for dtype, rates in getattr(speeds, kind).items()
            if rates
        )
        for kind, title in titles.items()
    }


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
    colors = ["tab:orange" if line["peer"].startswith(OURS) else "tab:gray" for line in timed]
    figure = Figure(figsize=(7, 0.5 * len(timed) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([line["peer"] for line in timed], speed, color=colors, xerr=[[0] * len(best), best], capsize=3)
    axes.bar_label(bars, [f"{value:.0f}" for value in speed], padding=4)
    axes.margins(x=0.12)
    axes.set_xlabel("residues/s: proteins in, mean embeddings out (median; whisker: best round)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
