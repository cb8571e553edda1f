"""A data set beside the model alone: what planning, reading, checking and writing cost, in one run.

    python benches/bench_dataset.py
    python benches/bench_dataset.py --fasta uniprot.fasta.gz --proteins 600 --dtype bfloat16
    python benches/bench_dataset.py --layers 4 --width 1280     # random weights: a wider model, which weighs more
    python benches/bench_dataset.py --tiny                      # seconds: shows that it runs, its numbers mean nothing

The data set: all of `esm-fast embed -o OUT/` after the model is loaded, to the last file. The model alone: its forward
passes and the pooling over the very same packed batches, which were made before; nothing is read, kept or written, and
its numbers are compared with the data set's. They take turns, since a shared machine's speed drifts, and the model's
times are taken batch by batch, over the rounds, and then added up: a disturbance spoils a batch and not the round. CPU
seconds are of all threads: those of reading and writing, which run beside the model, are in its lines.
"""

import argparse
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench_peers import SAMPLE
from common import Job
from machine import machine
from proteins import choose, read
from report import write_table
from tqdm import tqdm

from esm_fast import weights
from esm_fast.dataset.build import Options, exact, loader, planned, settings_of
from esm_fast.dataset.compute import Computer
from esm_fast.dataset.verify import finish
from esm_fast.dataset.worker import work
from esm_fast.inference import stream
from esm_fast.models.esm1 import ESM1, Config

ALONE, WITHIN, REST, TOTAL = "model alone", "model, in the data set", "units, beside the model", "data set"
PARTS = (WITHIN, "planning", REST, "verifying")
COLUMNS = {"run": "{}"} | {f"{how} {unit}": "{:.3f}" for unit in ("s", "CPU s") for how in ("median", "min")}
COLUMNS |= {"of the data set": "{:.1%}"}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    header = machine()
    with tempfile.TemporaryDirectory() as folder:
        job = Job.write(choose(read(args.fasta), 0, args.proteins, 4096), Path(folder, "in.fasta"))
        model = model_of(args, Path(folder))
        dataset = Dataset(Options(job.fasta, folder, model, dtype=args.dtype, unit_residues=args.unit_residues))
        residues = sum(len(residues) for _, residues in job.proteins)
        header |= {
            "model": f"{args.layers} layers x {args.width}, random" if args.layers else "esm1b_t6_demo",
            "work": f"{len(job.proteins)} proteins of {args.fasta.name}, {residues} residues, units of "
            f"{args.unit_residues} at most, {args.dtype}",
            "rounds": str(args.rounds),
        }
        print("\n".join(f"{name}: {value}" for name, value in header.items()), flush=True)
        rows = compare(dataset, args.rounds)
    write_table(rows, COLUMNS, header, args.out, "dataset")
    return 0


def parse(argv) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--fasta", type=Path, default=SAMPLE, help="proteins to embed (default: the sample in examples/)")
    add("--proteins", type=int, default=200, help="how many of them, of mixed lengths (default 200)")
    add("--unit-residues", type=int, default=1 << 15, help="residues in a shard (default 32768: some shards)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--layers", type=int, help="a random model of so many layers in place of the shipped one")
    add("--width", type=int, default=1280, help="its width, in heads of 64 (default 1280)")
    add("--rounds", type=int, default=5)
    add("--tiny", action="store_true", help="a toy model: only to see that everything runs")
    add("--out", type=Path, default=Path("out/dataset"), help="folder of the results (default out/dataset)")
    args = options.parse_args(argv)
    if args.tiny:
        args.layers, args.width = 1, 64
    return args


def model_of(args, folder: Path) -> str:
    if not args.layers:
        return "esm1b_t6_demo"
    torch.manual_seed(0)
    path = folder / "random.safetensors"
    weights.save(ESM1(Config(args.layers, args.width, 4 * args.width, args.width // 64)), path)
    return str(path)


class Dataset:
    """Makes the same data set again and again, each time in a new folder; knows the batches that the model saw."""

    def __init__(self, options: Options):
        self.options, self.count = options, 0
        self.load = loader(options)
        self.model = self.load(dtype=options.dtype)
        with calls() as batches:
            self.make()
        self.batches, self.expected, _ = zip(*batches, strict=True)

    def make(self) -> dict[str, np.ndarray]:
        """(seconds, CPU seconds) of each part; of the model's, a row a batch."""
        out, self.count = self.options.folder / str(self.count), self.count + 1
        options = replace(self.options, folder=out)
        begin = clocks()
        plan = planned(options, settings_of(options, self.model.config, self.model.device, options.dtype))
        ready, done = clocks(), []
        with calls() as batches:
            compute = Computer(self.model, plan.settings, exact(plan, self.load))
            work(plan, list(range(plan.units)), compute, done.append)
        worked = clocks()
        _, found = finish(out)
        end = clocks()
        if found.problems or found.failed or len(done) != plan.units:
            raise AssertionError(f"the data set is not complete: {found.problems}, {dict(found.status)}")
        within = np.array([seconds for _, _, seconds in batches])
        rest = worked - ready - within.sum(0)
        return dict(zip(PARTS, (within, ready - begin, rest, end - worked), strict=True))

    def model_alone(self) -> np.ndarray:
        with calls() as batches:
            for given in self.batches:
                stream._forward(*given)
        for (_, made, _), expected in zip(batches, self.expected, strict=True):
            np.testing.assert_array_equal(made, expected)
        return np.array([seconds for _, _, seconds in batches])


@contextmanager
def calls():
    """Yields the list of what the stream is given and makes, batch by batch, and the seconds it takes."""
    batches, forward = [], stream._forward

    def noting(*given):
        begin = clocks()
        made = forward(*given)
        batches.append((given, made, clocks() - begin))
        return made

    stream._forward = noting
    try:
        yield batches
    finally:
        stream._forward = forward


def clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def compare(dataset: Dataset, rounds: int) -> list[dict]:
    times = {name: [] for name in (ALONE, *PARTS)}

    def make():
        for name, seconds in dataset.make().items():
            times[name].append(seconds.reshape(-1, 2))

    def model_alone():
        times[ALONE].append(dataset.model_alone())

    for turn in tqdm(range(rounds), unit="round"):
        for run in (make, model_alone) if turn % 2 == 0 else (model_alone, make):
            run()
    rows = [row(name, np.array(seconds)) for name, seconds in times.items()]
    total = {"run": TOTAL} | {
        key: sum(row[key] for row in rows[1:]) for key in COLUMNS if key in rows[0] and key != "run"
    }
    for line in rows:
        line["of the data set"] = line["median s"] / total["median s"]
    return [*rows, total]


def row(name: str, times: np.ndarray) -> dict:
    """A line of the table, of (rounds, batches, 2) seconds and CPU seconds."""
    line = {"run": name}
    for i, unit in enumerate(("s", "CPU s")):
        by_batch = times[:, :, i]
        line |= {f"median {unit}": np.median(by_batch, axis=0).sum(), f"min {unit}": by_batch.min(axis=0).sum()}
    return line | {"rounds": times.sum(1).tolist()}


if __name__ == "__main__":
    sys.exit(main())
