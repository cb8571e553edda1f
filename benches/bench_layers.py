"""What it costs to pool every layer instead of the last, taking turns, at ESM-1b's proportions.

    python benches/bench_layers.py                       # 6 layers of ESM-1b's width, bf16, about 4,000 tokens
    python benches/bench_layers.py --layers 33 --dtype float32
    python benches/bench_layers.py --proteins 6 --rounds 40 --alone   # one thread, in CPU seconds: where others compute

"kept" is the other way: the stream after every layer is kept, and pooled when all is done. Vectors are compared with it
before anything is timed.
"""

import argparse
import time
from statistics import median

import numpy as np
import torch
from machine import machine

import esm_fast
from esm_fast import _C
from esm_fast.inference.outputs import make
from esm_fast.inference.stream import run
from esm_fast.models.esm1 import Config
from esm_fast.sequences.fasta import records_from
from esm_fast.sequences.tokenize import Policy, Report, tokenize

POOLS = ("mean", "cls", "max", "std")
LENGTHS = (1022, 683, 460, 351, 351, 264, 264, 187, 187, 103, 103)  # tokens, but for <cls> and <eos>


class Kept:
    """An output made of the representation itself, as the pass pools it, but afterwards."""

    def __init__(self, name: str, layer: int):
        self.pooled, self.layer = make(name, layer), layer

    def needs(self, batch):
        return self.pooled.needs(batch)._replace(pools=(), layers=(self.layer,))

    def reduce(self, given, batch):
        (pool,) = self.pooled.needs(batch).pools
        x = given.representations[self.layer]
        made = esm_fast.ops.POOLS[pool.op](x, batch.packed.cu_seqlens, pool.rows, backend=given.model.backend)
        return list(made.cpu().numpy())

    def finish(self, part):
        return self.pooled.finish(part)


def ways(layers: int) -> dict[str, list]:
    every = range(1, layers + 1)
    found = {"last layer, mean": [make("mean", layers)]}
    found |= {f"all layers, {name}": [make(name, layer) for layer in every] for name in POOLS}
    found["last layer, all four"] = [make(name, layers) for name in POOLS]
    found["all layers, all four"] = [make(name, layer) for name in POOLS for layer in every]
    found["all layers, mean, kept"] = [Kept("mean", layer) for layer in every]
    found["all layers, all four, kept"] = [Kept(name, layer) for name in POOLS for layer in every]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--proteins", type=int, default=len(LENGTHS), help="of as many, the shortest")
    parser.add_argument("--alone", action="store_true", help="one thread, timed in CPU seconds")
    args = parser.parse_args()
    clock = time.process_time if args.alone else time.perf_counter
    torch.set_num_threads(1 if args.alone else torch.get_num_threads())
    _C.set_threads(torch.get_num_threads())
    model, tokens = job(args)

    def pass_over(outputs):
        return [protein.arrays for protein in run(model, [tokens], outputs, 4096)]

    found = ways(args.layers)
    verify(pass_over(found["all layers, all four"]), pass_over(found["all layers, all four, kept"]))
    print("\n".join(f"{name}: {value}" for name, value in machine().items()))
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(args.rounds):
        for name, outputs in found.items():
            begin = clock()
            pass_over(outputs)
            seconds[name].append(clock() - begin)
    base, *_ = seconds.values()
    for name, taken in seconds.items():
        ratio = median(one / other for one, other in zip(taken, base, strict=True))
        least = f"least {min(taken):.4f} s, {min(taken) / min(base):.3f} x"
        print(f"{name:27} median {median(taken):.4f} s, {ratio:.3f} x the last layer's; {least}")


def job(args):
    torch.manual_seed(0)
    config = Config(args.layers, args.width, 4 * args.width, args.width // 64)
    model = esm_fast.ProteinBertModel(config).eval().to(getattr(torch, args.dtype))
    rng = np.random.default_rng(0)
    proteins = [
        (f"p{i}", "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), n))) for i, n in enumerate(LENGTHS[-args.proteins :])
    ]
    (records,) = records_from(proteins)
    return model, tokenize(records, Policy(), Report())


def verify(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        for got, wanted in zip(one, other, strict=True):
            np.testing.assert_array_equal(got, wanted)


if __name__ == "__main__":
    main()
