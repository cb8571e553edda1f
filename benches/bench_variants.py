"""Variant effects side by side: a masked scan of TEM-1 on full-size ESM-1b, every peer on the same weights, in one run.

    python benches/bench_variants.py                      # about ten minutes on two cores
    python benches/bench_variants.py --tiny               # seconds: shows that all of it runs, its numbers mean nothing
    python benches/bench_variants.py --mature --positions 42 --rounds 5
    python benches/bench_variants.py --wt 200             # instead: `wt` scans beside embeddings of the same proteins

A scan of 286 residues is 82,000 tokens, and fair-esm's loop takes many minutes for it: `--positions` of the protein,
evenly spaced, are computed, and of peers with a pass a position `--loop-positions` of these. All contexts are
equally long, so seconds a position are comparable; a whole scan's are estimated from them. Scores are verified against
fair-esm's in float32 before anything is timed; then the peers take turns, since a shared machine's speed drifts.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
from bench_peers import SAMPLE
from common import TINY, Setup, Size, parser_of, token_counts
from machine import machine
from proteins import choose, read
from random_weights import random_state
from report import write_table
from tqdm import tqdm
from variant_peers import PEERS, Run, ScanPeer

TEM1 = Path(__file__).parents[1] / "examples" / "tem1.fasta"
SIGNAL = 23  # residues of TEM-1 that the mature protein lacks
REFERENCE = "fair-esm-fp32"
# Root mean square of the error of the scores over theirs. bf16 peers reach some hundredths through 33 layers; a scan
# without the mask, or of the neighbour's row, is off by 1.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "int8": 0.2}
SCAN_COLUMNS = {
    "peer": "{}", "positions": "{}", "median s": "{:.3g}", "min s": "{:.3g}", "tokens/s": "{:.0f}",
    "x fair-esm fp32": "{:.2f}", "x HF bf16": "{:.2f}", "error": "{:.0e}", "whole scan, estimated s": "{:.0f}",
}  # fmt: skip
WT_COLUMNS = {
    "run": "{}", "median s": "{:.3g}", "min s": "{:.3g}", "residues/s": "{:.0f}", "of the embeddings' rate": "{:.3f}",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    size = TINY if args.tiny else Size()
    size = replace(size, layers=args.layers or size.layers)
    setup = Setup(size, random_state(size, args.seed), args.batch_tokens, [])
    header = machine()
    header["model"] = f"{size.layers} layers x {size.embed_dim}, random weights (seed {args.seed})"
    header["rounds"] = f"{args.rounds}, after one verified run"
    if args.wt:
        rows, columns, name = wt_beside_embeddings(setup, args, header), WT_COLUMNS, "wt"
    else:
        rows, columns, name = masked_scan(setup, args, header), SCAN_COLUMNS, "masked"
    print("\n".join(f"{key}: {value}" for key, value in header.items()))
    write_table(rows, columns, header, args.out, name)
    return 0


def parse(argv) -> argparse.Namespace:
    parser = parser_of(__doc__)
    names = [peer.name for peer in PEERS]
    add = parser.add_argument
    add("--peers", nargs="+", choices=names, default=names, metavar="PEER", help=f"of {', '.join(names)}")
    add("--mature", action="store_true", help="TEM-1's 263 residues without the signal peptide, in place of all 286")
    add("--positions", type=int, default=28, help="to scan, evenly spaced (default 28: two batches)")
    add("--loop-positions", type=int, default=4, help="of these, by peers that take a pass a position (default 4)")
    add("--wt", type=int, metavar="N", help="instead: `wt` scans of N proteins of the sample, and their embeddings")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "int8"), help="of --wt (default bfloat16)")
    add("--rounds", type=int, default=3)
    add("--batch-tokens", type=int, default=4096, help="tokens of a batch (default 4096)")
    add("--layers", type=int, help="fewer layers than ESM-1b's 33, for a quicker look")
    add("--tiny", action="store_true", help="a toy model: only to see that everything runs")
    add("--seed", type=int, default=0, help="of the random weights")
    add("--out", type=Path, default=Path("out/variants"), help="folder of the results (default out/variants)")
    args = parser.parse_args(argv)
    if missing := [module for module in ("esm", "transformers") if find_spec(module) is None]:
        parser.error(f"{', '.join(missing)} missing; pip install 'esm_fast[bench]'")
    args.peers = [name for name in names if name in {REFERENCE, *args.peers}]
    return args


def in_turns(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, a round: forwards and backwards, so that a drift of the machine hits all of them."""
    seconds = {name: [] for name in runs}
    for turn in tqdm(range(rounds), unit="round"):
        for name in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            begin = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


# ---- a masked scan


def masked_scan(setup: Setup, args, header: dict[str, str]) -> list[dict]:
    ((_, protein),) = read(TEM1)
    protein = protein[SIGNAL:] if args.mature else protein
    positions = np.unique(np.linspace(0, len(protein) - 1, args.positions).round().astype(int)).tolist()
    some = positions[:: max(1, len(positions) // args.loop_positions)][: args.loop_positions]
    header["work"] = (
        f"masked scan of TEM-1, {len(protein)} residues: {len(positions)} positions, {len(some)} of them by the loops; "
        f"{len(protein) + 2} tokens a context"
    )
    peers = {peer.name: peer for peer in PEERS if peer.name in args.peers and not peer.why_not(setup)}
    runs, errors = _verified(setup, protein, peers, positions, some)
    wanted = {name: some if peer.one_by_one else positions for name, peer in peers.items()}
    timed = {name: lambda name=name: runs[name](wanted[name]) for name in peers}
    seconds = in_turns(timed, args.rounds)
    return [_scan_row(name, seconds, wanted, errors[name], len(protein)) for name in peers]


def _verified(
    setup: Setup, protein: str, peers: dict[str, ScanPeer], positions: list[int], some: list[int]
) -> tuple[dict[str, Run], dict[str, float]]:
    """Builds the peers; their scores, which also warm them up, are those of the reference at its positions."""
    runs, errors, truth = {}, {}, None
    for name, peer in peers.items():
        runs[name] = peer.build(setup, protein)
        found = runs[name](some if peer.one_by_one else positions)
        found = found if peer.one_by_one else found[[positions.index(at) for at in some]]
        truth = found if truth is None else truth
        errors[name] = float(np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2)))
        if not errors[name] <= TOLERANCE[peer.dtype]:
            raise AssertionError(f"{name}'s scores have error {errors[name]:.1e}, allowed {TOLERANCE[peer.dtype]:.0e}")
    return runs, errors


def _scan_row(name: str, seconds: dict, wanted: dict, error: float, residues: int) -> dict:
    each = {other: [s / len(wanted[other]) for s in taken] for other, taken in seconds.items()}

    def times(other: str) -> float | None:
        return median(b / a for b, a in zip(each[other], each[name], strict=True)) if other in each else None

    return {
        "peer": name,
        "positions": len(wanted[name]),
        "median s": median(seconds[name]),
        "min s": min(seconds[name]),
        "tokens/s": (residues + 2) / median(each[name]),
        "x fair-esm fp32": times(REFERENCE),
        "x HF bf16": times("hf-bf16"),
        "error": error,
        "whole scan, estimated s": residues * median(each[name]),
        "seconds": seconds[name],
    }


# ---- wt beside embeddings


def wt_beside_embeddings(setup: Setup, args, header: dict[str, str]) -> list[dict]:
    from peers import our_model

    from esm_fast.inference.embed import embed
    from esm_fast.variants.scores import scans

    proteins = choose(read(SAMPLE), 0, args.wt, args.batch_tokens)
    texts, residues = [text for _, text in proteins], int(token_counts(proteins).sum()) - 2 * len(proteins)
    header["work"] = f"{len(proteins)} proteins of {SAMPLE.name}, {residues} residues, {args.dtype}"
    model = our_model(setup.size, setup.state, args.dtype)
    budget, last = args.batch_tokens, setup.size.layers
    runs = {
        "embeddings": lambda: list(embed(model, proteins, layers=(last,), batch_tokens=budget)),
        "wt": lambda: list(scans(model, texts, "wt", "auto", budget)),
    }
    _verify_wt(setup, model, args, texts[:2])
    seconds = in_turns(runs, args.rounds)
    ratios = {
        name: [b / a for b, a in zip(seconds["embeddings"], taken, strict=True)] for name, taken in seconds.items()
    }
    return [
        {
            "run": name,
            "median s": median(taken),
            "min s": min(taken),
            "residues/s": residues / median(taken),
            "of the embeddings' rate": median(ratios[name]),
            "seconds": taken,
        }
        for name, taken in seconds.items()
    ]


def _verify_wt(setup: Setup, model, args, texts: list[str]) -> None:
    from peers import our_model

    from esm_fast.variants.scores import scans

    exact = our_model(setup.size, setup.state, "float32")
    found, truth = (np.concatenate(list(scans(m, texts, "wt", "auto", args.batch_tokens))) for m in (model, exact))
    error = np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2))
    if not error <= TOLERANCE["int8"]:
        raise AssertionError(f"scores in {args.dtype} have error {error:.1e} against float32")


if __name__ == "__main__":
    sys.exit(main())
