"""Host time of a forward on a GPU, measured here with the launches stubbed out: what Python costs before a GPU works.

    python benches/host_time.py                            # one batch through ESM-1b's 33 layers
    python benches/host_time.py --profile                  # and where the time goes

The Triton kernels are compiled for sm_90 and launched by Triton's own launcher, down to a driver that does nothing
(stub_driver.py; needs a C compiler). What a real driver takes for a launch, a microsecond or two, is not in it; no
number here is a GPU's. Times are the thread's own CPU time. The other backends are torch's operations, which cannot be
stubbed out: on a CPU they compute.
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from stub_driver import launches, stubbed

from esm_fast.models.esm1 import Config
from esm_fast.models.family import of_config
from esm_fast.sequences.batching import pack

WIDTH, HEADS, LAYERS = 64, 1, 33  # the width does not matter: nothing is computed
LENGTHS = (10, 7)
ROUNDS = 200


def model_of():
    config = Config(LAYERS, WIDTH, 4 * WIDTH, HEADS)
    return of_config(config).model(config, backend="triton").bfloat16().requires_grad_(False).eval()


def batch_of(lengths=LENGTHS):
    lengths = np.array(lengths)
    ids = np.full(lengths.sum(), 5, dtype=np.uint8)
    return pack(ids, lengths.cumsum() - lengths, lengths, np.arange(len(lengths)))


def milliseconds(call: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """(median, least)"""
    for _ in range(5):
        call()
    times = []
    for _ in range(rounds):
        begin = time.thread_time()
        call()
        times.append(1e3 * (time.thread_time() - begin))
    return statistics.median(times), min(times)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, batch = model_of(), batch_of()

    def call():
        return model.forward_packed(batch, layers=(LAYERS,))

    with stubbed(), torch.inference_mode():
        call()
        before = launches()
        call()
        of_one = launches() - before
        median, least = milliseconds(call)
        print(f"host time of {LAYERS} layers: {median:.3f} ms by median, {least:.3f} at least, {of_one} launches")
        if args.profile:
            with cProfile.Profile() as profile:
                for _ in range(50):
                    call()
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)
    return 0


if __name__ == "__main__":
    sys.exit(main())
