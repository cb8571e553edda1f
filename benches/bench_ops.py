"""Every op on every backend that runs on this machine, taking turns, on the cases of the ops' own contracts.

    python benches/bench_ops.py                       # bf16, all threads
    python benches/bench_ops.py --ops gelu_ffn pre_ln_attention --dtype float32 --isa avx2
    python benches/bench_ops.py --dtype int8          # the 8-bit layers beside those of bf16
    python benches/bench_ops.py --alone               # one thread, in CPU seconds: for a machine that others use too
    python benches/bench_ops.py --device cuda --json ops.json

A kernel is verified against the op's reference in fp64 before it is timed (8 bits: against bf16); one that cannot run
is left out with its reasons. On CPUs "peak" is the GEMM's innermost loop on operands in the first-level cache, measured
between the runs; "share" is of it. A row's FLOPs are its GEMMs' and its attention products'. "x" is how many times as
fast as the first backend named.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from common import parser_of
from machine import machine

from esm_fast import _C
from esm_fast.formats.int8 import Int8Weight
from esm_fast.ops import OPS, registry, verify

DTYPES = ("bfloat16", "float32", "int8")
WITH_8_BITS = ("gelu_ffn", "pre_ln_attention")
INT8_ERROR = 0.05  # relative, of one op beside bf16
Run = Callable[[], object]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.alone:
        torch.set_num_threads(1)
    _C.set_threads(torch.get_num_threads())
    _C.set_isa(args.isa)
    print("\n".join(f"{name}: {value}" for name, value in machine().items()))
    where = f"kernels: {args.isa}, " if args.device == "cpu" else ""
    print(f"{where}{args.dtype}; {'CPU seconds of one thread' if args.alone else 'wall clock'}")
    wanted = args.ops or (WITH_8_BITS if args.dtype == "int8" else sorted(OPS))
    found = []
    for name in wanted:
        for case in OPS[name].cases() if args.tiny else OPS[name].bench_cases():
            rows = measure(OPS[name], case, args)
            found += rows
            print("\n".join(map(line, rows)), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": found}, indent=1))
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--isa", choices=_C.isas(), default=_C.isa())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ops", nargs="+", choices=sorted(OPS), help="only these")
    parser.add_argument("--alone", action="store_true", help="one thread, timed in CPU seconds")
    parser.add_argument("--tiny", action="store_true", help="the cases of the tests: does it run here?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows, and the machine")
    args = parser.parse_args(argv)
    if args.dtype == "int8" and (args.device != "cpu" or set(args.ops or ()) - set(WITH_8_BITS)):
        parser.error(f"8 bits are of {' and '.join(WITH_8_BITS)} on CPUs")
    return args


@torch.inference_mode()
def measure(op: registry.Op, case: registry.Case, args: argparse.Namespace) -> list[dict]:
    """A row a backend: {op, case, backend, ms, ...}, or the reasons it has none."""
    runs, rows = contenders_of_8_bits(op, case) if args.dtype == "int8" else contenders(op, case, args)
    cost = op.cost(**verify.bound(op, case.build(_floating(args), args.device, 0)))
    repeats = 1 if args.tiny else max(1, int(2e10 / (2e7 + cost.flops + 20 * cost.bytes)))
    seconds, peak = take_turns(runs, repeats, args)
    first = next(iter(seconds.values()), None)
    for name, times in seconds.items():
        rate = cost.flops / median(times)
        row = {
            "op": op.name,
            "case": case.name,
            "backend": name,
            "ms": 1e3 * median(times),
            "least ms": 1e3 * min(times),
        }
        row |= {"x": median(a / b for a, b in zip(first, times, strict=True)), "GFLOP/s": rate / 1e9}
        row |= {"GB/s": cost.bytes / median(times) / 1e9} | ({"peak": peak, "share": rate / peak / 1e9} if peak else {})
        rows.append(row)
    return rows


def contenders(op: registry.Op, case: registry.Case, args) -> tuple[dict[str, Run], list[dict]]:
    """The reference and the kernels that run here, verified; and rows for those that do not."""
    dtype, runs, left = _floating(args), {}, []
    values = verify.bound(op, case.build(dtype, args.device, 0))
    for kernel in sorted(registry.kernels(op.name), key=lambda kernel: kernel.backend != registry.REFERENCE):
        if reasons := kernel.why_not(op.request(values)):
            about = {"op": op.name, "case": case.name, "backend": kernel.backend}
            left.append(about | {"reasons": "; ".join(reasons)})
            continue
        if kernel.backend != registry.REFERENCE:
            wrong = [check for check in verify.forward(op, kernel, case, dtype, args.device) if not check.ok]
            assert not wrong, f"{op.name} on {kernel.backend}, case {case.name}, not timed: {wrong[0]}"
        runs[kernel.backend] = lambda forward=kernel.forward: forward(*values.values())
    return runs, left


def contenders_of_8_bits(op: registry.Op, case: registry.Case) -> tuple[dict[str, Run], list[dict]]:
    forward = next(kernel.forward for kernel in registry.kernels(op.name) if kernel.backend == "cpu")
    values = list(verify.bound(op, case.build(torch.bfloat16, "cpu", 0)).values())
    narrow = [_quantised(value) for value in values]
    runs = {"bf16": lambda: forward(*values), "int8": lambda: forward(*narrow)}
    plain, got = (verify.outputs_of(run())[0].double() for run in runs.values())
    error = float((got - plain).norm() / max(1e-30, plain.norm()))
    assert error < INT8_ERROR, f"{op.name} in 8 bits, case {case.name}: relative error {error:.3f}, not timed"
    return runs, []


def take_turns(runs: dict[str, Run], repeats: int, args) -> tuple[dict[str, list[float]], float]:
    """(seconds a call of each, the peak in GFLOP/s, 0 where there is none); the first turn warms up."""
    clock = time.process_time if args.alone else time.perf_counter
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks = [0.0]
    for turn in range(args.rounds + 1):
        if args.device == "cpu":
            peaks.append(_C.peak(args.dtype))
        for name, run in runs.items():
            run()  # not timed: another one's threads may still be spinning
            wait()
            begin = clock()
            for _ in range(repeats if turn else 1):
                run()
            wait()
            if turn:
                seconds[name].append((clock() - begin) / repeats)
    return seconds, max(peaks)


def line(row: dict) -> str:
    head = f"{row['op']:17} {row['case']:12} {row['backend']:9}"
    if "reasons" in row:
        return f"{head} {row['reasons']}"
    of_peak = f", {row['share']:.2f} of the peak of {row['peak']:.0f}" if "share" in row else ""
    rates = f"{row['x']:5.2f} x; {row['GFLOP/s']:.0f} GFLOP/s{of_peak}"
    return f"{head} {row['ms']:9.3f} ms (least {row['least ms']:.3f}), {rates}"


def _floating(args) -> torch.dtype:
    return torch.bfloat16 if args.dtype == "int8" else getattr(torch, args.dtype)


def _quantised(value):
    """The layers' matrices in 8 bits."""
    matrix = isinstance(value, torch.Tensor) and value.ndim == 2 and value.dtype == torch.bfloat16
    return Int8Weight.pack(value) if matrix else value


if __name__ == "__main__":
    raise SystemExit(main())
