"""Training side by side: ours, Hugging Face's Trainer, and a loop over batches sorted by length, in one run.

    python benches/bench_train.py                     # the small model on 100 proteins: minutes
    python benches/bench_train.py --precision float32 --rounds 5
    python benches/bench_train.py --tiny              # seconds: shows that all of it runs, its numbers mean nothing

Every peer starts from the same weights and sees the same proteins; its loss and gradient on the same masked batch are
compared with ours first. Every run is a process of its own: an epoch to warm up, one timed. They take turns, since a
shared machine's speed drifts. Tokens are counted without padding.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from bench_peers import SAMPLE
from common import token_counts
from machine import machine
from proteins import choose, padding, read
from report import write_table
from tqdm import tqdm
from train_peers import HF_BATCH, PEERS, Outcome, Task, run

from esm_fast.models.esm1 import CONFIGS, Config
from esm_fast.sequences.tokenize import Policy
from esm_fast.train.environment import SETTINGS
from esm_fast.train.prepare import prepare
from esm_fast.train.recipe import Recipe

NEEDS = {"hf-trainer": ("transformers", "accelerate"), "sorted-loop": ("transformers",), "esm_fast": ()}
# Of loss and gradient, relative to ours; autocast rounds elsewhere than we do.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
COLUMNS = {
    "peer": "{}", "median s": "{:.3g}", "min s": "{:.3g}", "tokens/s": "{:.0f}", "ours is faster": "{:.2f} x",
    "peak MB": "{:.0f}", "ours takes": "{:.2f} x",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    header = machine()
    with tempfile.TemporaryDirectory() as folder:
        tasks = tasks_of(args, Path(folder), header)
        print("\n".join(f"{name}: {value}" for name, value in header.items()), flush=True)
        outcomes = {(task.peer, task.recipe.precision): [] for task in tasks}
        for turn in tqdm(range(args.rounds), unit="round"):
            for task in tasks if turn % 2 == 0 else tasks[::-1]:
                outcomes[task.peer, task.recipe.precision].append(in_a_process(task))
    rows = [row(*key, outcomes) for key in outcomes]
    write_table(rows, COLUMNS, header, args.out, "train")
    return 0


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=f"of {', '.join(PEERS)}")
    add("--precision", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    add("--fasta", type=Path, default=SAMPLE, help="proteins to train on (default: the sample in examples/)")
    add("--proteins", type=int, default=100, help="how many of them, of mixed lengths (default 100)")
    add("--batch-tokens", type=int, default=4096, help="in a step of ours and of the sorted loop (default 4096)")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--tiny", action="store_true", help="a toy model: only to see that everything runs")
    add("--out", type=Path, default=Path("out/train"), help="folder of the results (default out/train)")
    args = parser.parse_args(argv)
    args.peers = sorted({*args.peers, "esm_fast"}, key=list(PEERS).index)  # the others are measured against ours
    return args


def tasks_of(args, folder: Path, header: dict[str, str]) -> list[Task]:
    """Writes the store that all of them read; says in the header what is trained on what."""
    for peer in args.peers:
        if absent := [module for module in NEEDS[peer] if find_spec(module) is None]:
            raise SystemExit(f"{peer} needs {', '.join(absent)}; pip install 'esm_fast[bench]'")
    proteins = choose(read(args.fasta), 0, args.proteins, args.batch_tokens)
    fasta = folder / "proteins.fasta"
    fasta.write_text("".join(f">{label}\n{residues}\n" for label, residues in proteins))
    prepare([fasta], folder / "store", policy=Policy(), valid_share=0.0)
    model = Config(2, 32, 64, 2) if args.tiny else CONFIGS["esm1b_t6_demo"]
    tokens = int(token_counts(proteins).sum())
    recipe = Recipe(
        model=model, store=str(folder / "store"), output="", steps=2 * -(-tokens // args.batch_tokens),
        step_tokens=args.batch_tokens, batch_tokens=args.batch_tokens, learning_rate=1e-3, warmup=100, clip=1.0,
        save_every=10**9, plot=False,
    )  # fmt: skip
    batches, share = padding(proteins, args.batch_tokens)
    header |= {
        "model": f"{model.layers} layers x {model.embed_dim}, {model.attention_heads} heads",
        "work": f"an epoch of {len(proteins)} proteins of {args.fasta.name}, {tokens} tokens",
        "batches": f"ours packed, {args.batch_tokens} tokens; sorted-loop: {batches}, {share:.1%} padding; hf-trainer: "
        f"{HF_BATCH} proteins in random order, padded to the longest; an update after each",
        "rounds": str(args.rounds),
    }
    return [
        Task(peer, replace(recipe, precision=precision), args.threads)
        for precision in args.precision
        for peer in args.peers
    ]


def in_a_process(task: Task) -> Outcome:
    """Ours in the environment that `esm-fast pretrain` makes for itself, the others in the one they are given."""
    settings = SETTINGS if task.peer == "esm_fast" else {}
    with mock.patch.dict(os.environ, settings), multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(run, (task,))


def row(peer: str, precision: str, outcomes: dict[tuple[str, str], list[Outcome]]) -> dict:
    """A line of the table. Raises AssertionError for a peer that did not compute what ours did."""
    own, mine = outcomes[peer, precision], outcomes["esm_fast", precision]
    for name in ("loss", "norm"):
        got, expected = getattr(own[0], name), getattr(mine[0], name)
        if not abs(got - expected) <= TOLERANCE[precision] * expected:
            raise AssertionError(f"{peer}'s {name} of the first batch is {got} in {precision}, ours {expected}")
    seconds, tokens = [outcome.seconds for outcome in own], own[0].tokens
    return {
        "peer": f"{peer}-{precision}",
        "median s": median(seconds),
        "min s": min(seconds),
        "tokens/s": tokens / median(seconds),
        "ours is faster": median(s / m.seconds for s, m in zip(seconds, mine, strict=True)),
        "peak MB": median(outcome.peak for outcome in own) / 1e6,
        "ours takes": median(m.peak / o.peak for o, m in zip(own, mine, strict=True)),
        "outcomes": [vars(outcome) for outcome in own],
    }


if __name__ == "__main__":
    sys.exit(main())
