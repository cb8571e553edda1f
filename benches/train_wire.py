"""Bytes that a training step sends, a parameter and process, beside the ideal of (N - 1) / N x what is exchanged.

    python benches/train_wire.py --processes 2 4 8

Gloo processes in a network namespace of their own (Linux, unshare -rn), where nobody else sends: the loopback's counter
before and after some steps. The ideal is 4 bytes for the gradients in fp32 and as many as the layers' type has for the
parameters, of which each process needs all but its own share.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import parser_of

_MODEL = dict(layers=2, embed_dim=256, ffn_embed_dim=1024, attention_heads=4)
_STEPS = 3


def sent() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def worker(folder: Path) -> None:
    """One process of a run: prints, from the first, the bytes of the steps after the first."""
    from esm_fast.train.loop import Trainer
    from esm_fast.train.processes import joined
    from esm_fast.train.recipe import read_recipe
    from esm_fast.train.store import open_store

    torch.set_num_threads(1)
    recipe = read_recipe(folder / "recipe.yaml")
    with joined() as processes:
        trainer = Trainer(recipe, open_store(recipe.store), processes)
        for step in range(1 + _STEPS):
            if step == 1:
                processes.wait()
                before = sent()
            trainer._step(trainer._work(step))
        processes.wait()
        if processes.first:
            count = sum(parameter.numel() for parameter in trainer.parameters.values())
            print(json.dumps({"bytes": (sent() - before) / _STEPS / processes.world / count, "parameters": count}))
        processes.wait()


def measure(folder: Path, processes: int, sharding: str, precision: str) -> dict:
    recipe = dict(model=_MODEL, store=str(folder / "store"), output=str(folder / "out"), steps=_STEPS + 1, plot=False)
    recipe |= dict(step_tokens=2048, batch_tokens=2048, sharding=sharding, precision=precision)
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    launch = f"{sys.executable} -m torch.distributed.run --master-addr 127.0.0.1 --master-port 29555 --nproc-per-node"
    command = f"ip link set lo up && exec {launch} {processes} {os.path.abspath(__file__)} --worker {folder}"
    done = subprocess.run(["unshare", "-rn", "sh", "-c", command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8])
    kinds = ["none:bfloat16", "zero1:float32", "zero1:bfloat16"]
    parser.add_argument("--kinds", nargs="+", default=kinds, help="sharding:precision (default: %(default)s)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    from esm_fast.sequences.tokenize import Policy
    from esm_fast.train.prepare import prepare

    with tempfile.TemporaryDirectory() as name:
        folder, generator = Path(name), np.random.default_rng(0)
        rows = ("".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), 100)) for _ in range(500))
        (folder / "in.fasta").write_text("".join(f">p{i}\n{row}\n" for i, row in enumerate(rows)))
        prepare([folder / "in.fasta"], folder / "store", policy=Policy(), valid_share=0.05)
        print("| processes | sharding | precision | bytes a parameter and step | ideal |\n|--:|---|---|--:|--:|")
        for count in args.processes:
            for sharding, precision in (kind.split(":") for kind in args.kinds):
                found = measure(folder, count, sharding, precision)
                ideal = (4 + (4 if precision == "float32" else 2)) * (count - 1) / count
                print(f"| {count} | {sharding} | {precision} | {found['bytes']:.2f} | {ideal:.2f} |", flush=True)


if __name__ == "__main__":
    main()
