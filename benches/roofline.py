"""Labelled ESTIMATES of what the kernels could reach on GPUs that are not here; nothing in it was timed.

    python benches/roofline.py                       # a table an architecture
    python benches/roofline.py --plot roofline.png   # and the rooflines, with the ops on them (needs matplotlib)

An op's bound is the longer of two times: its FLOPs at the GPU's peak, and its bytes at its memory's bandwidth. Both are
the contract's, bytes times the traffic that was counted in Triton's interpreter. `warps` is the occupancy of the op's
tightest kernel, from its machine code: below about a quarter, latencies are hard to hide and the bound is far.
A kernel reaches a fraction of such a bound, often a half; the V100 has no Triton kernels here, only torch's.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import roofline_choices
import torch

from esm_fast.cli.kernels import read_table
from esm_fast.ops import OPS, verify
from esm_fast.ops.registry import Cost

LAYERS = 33


class GPU(NamedTuple):
    """Dense peaks of the vendor's data sheet: FLOP/s in half precision and in fp32, bytes/s; warps an SM can hold."""

    name: str
    arch: int
    half: float
    fp32: float
    bandwidth: float
    warps: int


GPUS = (
    GPU("V100 SXM2", 70, 125e12, 15.7e12, 0.9e12, 64),
    GPU("A100 SXM 80 GB", 80, 312e12, 19.5e12, 2.04e12, 64),
    GPU("H100 SXM", 90, 989e12, 67e12, 3.35e12, 64),
    GPU("B200", 100, 2250e12, 75e12, 8.0e12, 64),
)


class Estimate(NamedTuple):
    op: str
    case: str
    flops: int
    bytes: float
    microseconds: float
    bound: str
    warps: str

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes


def estimates(gpu: GPU, dtype: str) -> list[Estimate]:
    """For every bench case of every op whose traffic was counted, forward."""
    traffic = {row["op"]: row for row in read_table("interpreted.csv") if row["distinct"] and row["direction"] == "fwd"}
    peak, found = (gpu.fp32 if dtype == "float32" else gpu.half), []
    for name, row in traffic.items():
        for case in OPS[name].bench_cases():
            cost = _cost(name, case.name, dtype)
            moved = (cost.bytes + cost.between) * float(row["distinct"])
            computing, moving = cost.flops / peak, moved / gpu.bandwidth
            bound = "compute" if computing > moving else "memory"
            warps = _occupancy(row["kernels"].split(), gpu, dtype)
            found.append(Estimate(name, case.name, cost.flops, moved, 1e6 * max(computing, moving), bound, warps))
    return found


@functools.cache
def _cost(op_name: str, case_name: str, dtype: str) -> Cost:
    op = OPS[op_name]
    case = next(case for case in op.bench_cases() if case.name == case_name)
    return op.cost(**verify.bound(op, case.build(getattr(torch, dtype), "cpu", 0)))


def _occupancy(kernels: list[str], gpu: GPU, dtype: str) -> str:
    """Resident warps of the op's tightest kernel as a share of what an SM holds."""
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype]
    shares = [
        int(row["blocks"]) * int(row["warps"]) / gpu.warps
        for row in read_table("audit.csv")
        if row["kernel"] in kernels and row["arch"] == str(gpu.arch) and row["dtype"] == short
    ]
    return f"{min(shares):.0%}" if shares else "-"


def model_estimate(found: list[Estimate], tokens: int) -> float:
    """Residues a second if the layers ran at their bounds: an upper limit that no kernel reaches."""
    layer = sum(e.microseconds for e in found if (e.op, e.case) in {("pre_ln_attention", "natural")})
    ffn = sum(e.microseconds for e in found if (e.op, e.case) == ("gelu_ffn", "1024_rows"))
    return 1e6 / (LAYERS * (layer / tokens + ffn / 1024))


def plot(path: Path, dtype: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(9, 6))
    intensity = np.logspace(-1, 4, 200)
    for gpu in GPUS:
        peak = gpu.fp32 if dtype == "float32" else gpu.half
        axes.loglog(intensity, np.minimum(peak, gpu.bandwidth * intensity) / 1e12, label=gpu.name)
    for estimate in estimates(GPUS[-1], dtype):
        axes.axvline(estimate.intensity, color="0.85", zorder=0)
        axes.text(estimate.intensity, 0.12, f"{estimate.op} {estimate.case}", rotation=90, fontsize=6, va="bottom")
    axes.set(xlabel="FLOPs a byte moved", ylabel="TFLOP/s at most", ylim=(0.1, 4000))
    axes.set_title(f"Estimated bounds in {dtype}: no kernel was timed on any of these")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    for gpu in GPUS:
        found = estimates(gpu, args.dtype)
        print(f"\nESTIMATE, not measured: {gpu.name}, {args.dtype}")
        print(f"  {'op':18}{'case':16}{'at least':>12}  {'bound':9}{'FLOP/byte':>10}  warps")
        for e in found:
            print(f"  {e.op:18}{e.case:16}{e.microseconds:9.1f} us  {e.bound:9}{e.intensity:10.1f}  {e.warps}")
        limit = model_estimate(found, 2048)
        print(f"  all {LAYERS} layers of ESM-1b at these bounds: at most {limit:,.0f} residues/s")
        print("\n".join(f"  estimate: {line}" for line in roofline_choices.lines(gpu)))
    if args.plot:
        plot(args.plot, args.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
