"""The CPU backend against torch at ESM-1b's size, taking turns, beside the peak of its own instruction.

    python benches/bench_cpu.py                      # bf16, all threads
    python benches/bench_cpu.py --dtype float32 --isa avx2
    python benches/bench_cpu.py --dtype int8         # against our own bf16
    python benches/bench_cpu.py --alone              # one thread, in CPU seconds: for a machine that others use too

"peak" is the GEMM's innermost loop on operands in the first-level cache, measured between the runs; "share" is of it.
A row's FLOPs are its GEMMs' and its attention products'.
"""

import argparse
import time
from statistics import median

import torch
from machine import machine

from esm_fast import _C
from esm_fast.formats.int8 import Int8Weight
from esm_fast.ops import OPS, registry, verify
from esm_fast.ops.embedding import _case as embedding_case
from esm_fast.ops.gelu_ffn import _case as ffn_case
from esm_fast.ops.masked_lm_head import _case as head_case
from esm_fast.ops.masked_softmax import _case as softmax_case
from esm_fast.ops.pool import _case as pool_case
from esm_fast.ops.pre_ln_attention import _case as attention_case

NATURAL = [1022, 683, 460, 351, 264, 187, 103]
POINTS = [
    *(("gelu_ffn", ffn_case(f"{n} rows", n, 1280, 5120)) for n in (1, 30, 300, 1000, 4000)),
    *(
        ("pre_ln_attention", attention_case(name, lengths, 20, 64))
        for name, lengths in [
            ("1 x 300", [300]),
            ("20 x 100", [100] * 20),
            ("natural", NATURAL),
            ("4 x 1022", [1022] * 4),
        ]
    ),
    *(
        ("embedding", embedding_case(name, lengths, 1280))
        for name, lengths in [("1 x 300", [300]), ("natural", NATURAL)]
    ),
    ("masked_lm_head", head_case("1 row", 1, 1280)),
    ("masked_lm_head", head_case("150 masked", 1000, 1280, masked=150)),
    ("masked_lm_head", head_case("1000 rows", 1000, 1280)),
    *(("masked_softmax", softmax_case(f"20x{n}x{n}", [n], 20)) for n in (100, 300, 1022)),
    *(("pool", pool_case(name, lengths, 1280)) for name, lengths in [("1 x 300", [300]), ("natural", NATURAL)]),
]

WITH_8_BITS = ("gelu_ffn", "pre_ln_attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "int8"), default="bfloat16")
    parser.add_argument("--isa", choices=_C.isas(), default=_C.isa())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ops", nargs="+", choices=sorted({name for name, _ in POINTS}), help="only these")
    parser.add_argument("--alone", action="store_true", help="one thread, timed in CPU seconds")
    args = parser.parse_args()
    if args.alone:
        torch.set_num_threads(1)
    _C.set_threads(torch.get_num_threads())
    _C.set_isa(args.isa)
    print("\n".join(f"{name}: {value}" for name, value in machine().items()))
    print(f"kernels: {args.isa}, {args.dtype}; {'CPU seconds of one thread' if args.alone else 'wall clock'}")
    wanted = args.ops or (WITH_8_BITS if args.dtype == "int8" else OPS)
    for op_name, case in POINTS:
        if op_name in wanted:
            print(measure(op_name, case, args), flush=True)


@torch.inference_mode()
def measure(op_name: str, case: registry.Case, args) -> str:
    clock = time.process_time if args.alone else time.perf_counter
    op = OPS[op_name]
    kernels = {kernel.backend: kernel.forward for kernel in registry.kernels(op_name)}
    int8 = args.dtype == "int8"
    arguments = verify.bound(op, case.build(torch.bfloat16 if int8 else getattr(torch, args.dtype), "cpu", 0))
    values, (flops, moved, _) = arguments.values(), op.cost(**arguments)
    rival, rivals = ("bf16", kernels["cpu"]) if int8 else ("torch", kernels["reference"])
    runs = {"theirs": (rivals, values), "ours": (kernels["cpu"], [_quantised(v) for v in values] if int8 else values)}
    repeats = max(1, int(2e10 / (flops + 20 * moved)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks = []
    for turn in range(args.rounds + 1):  # the first warms up, and packs the weights
        peaks.append(_C.peak(args.dtype))
        for name, (run, given) in runs.items():
            run(*given)  # not timed: the other one's threads may still be spinning
            begin = clock()
            for _ in range(repeats):
                run(*given)
            if turn:
                seconds[name].append((clock() - begin) / repeats)
    theirs, ours, peak = median(seconds["theirs"]), median(seconds["ours"]), max(peaks) * 1e9
    ratio = median(a / b for a, b in zip(*seconds.values(), strict=True))
    return (
        f"{op_name:17} {case.name:10} {rival} {theirs * 1e3:8.2f} ms, ours {ours * 1e3:8.2f} ms, {ratio:5.2f} x; "
        f"peak {peak / 1e9:4.0f} GFLOP/s, share {flops / ours / peak:.2f} ({rival} {flops / theirs / peak:.2f})"
    )


def _quantised(value):
    """The layers' matrices in 8 bits."""
    matrix = isinstance(value, torch.Tensor) and value.ndim == 2 and value.dtype == torch.bfloat16
    return Int8Weight.pack(value) if matrix else value


if __name__ == "__main__":
    main()
