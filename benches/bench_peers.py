"""Side by side: a full-size model on proteins of natural lengths, every peer on the same weights, in one run.

    python benches/bench_peers.py            # everything; about an hour on two cores
    python benches/bench_peers.py --model esm2_t6_8M_UR50D --esm-cpp ENVIRONMENT/bin/python
    python benches/bench_peers.py --tiny     # seconds: shows that all of it runs, its numbers mean nothing
    python benches/bench_peers.py --peers hf-bf16 esm_fast-bf16 --residues 20000 --rounds 5
    python benches/bench_peers.py --isa avx2 --peers hf-fp32 esm_fast-fp32    # all held to AVX2
    python benches/bench_peers.py --latency                                   # one protein of 300 residues
    python benches/bench_peers.py --memory                                    # memory over the weights
    python benches/bench_peers.py --profile                                   # where our time goes

Outputs are verified before anything is timed; the peers then take turns, since a shared machine's speed drifts.
docs/benchmarks.md says how to read the result.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import levels
import memory_use
import report
import torch
from common import TINY, Job, Proteins, Setup, Size, parser_of, token_counts
from machine import machine
from peers import PEERS
from proteins import choose, padding, read, single
from random_weights import random_state
from rounds import compare

from esm_fast.models.family import canonical_name, published

SAMPLE = Path(__file__).parents[1] / "examples" / "uniprot_sample.fasta.gz"
CALIBRATION = 8  # proteins of the file, of mixed lengths, for the peers that calibrate


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.isa:
        levels.hold(args.isa)
    if args.threads:
        torch.set_num_threads(args.threads)
    size = Size.of(published()[canonical_name(args.model)])
    size = replace(TINY, family=size.family) if args.tiny else size
    size = replace(size, layers=args.layers or size.layers)
    whole = read(args.fasta)
    header, calibration = machine(), choose(whole, 0, CALIBRATION, args.batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        job = Job.write(proteins_of(args, whole), Path(folder, "proteins.fasta"))
        header |= describe(size, whole, job.proteins, args)
        print("\n".join(f"{name}: {value}" for name, value in header.items()), flush=True)
        if args.memory:
            rows = memory_use.memory(args.peers, (size, args.seed, args.batch_tokens, calibration), job)
            print("\nMB")
            report.write_table(rows, memory_use.COLUMNS, header, args.out, "memory")
        else:
            setup = Setup(size, random_state(size, args.seed), args.batch_tokens, calibration, args.esm_cpp)
            results, speeds = compare(setup, job, args.peers, args.rounds, warm=args.latency is not None)
            rows = [report.row(result, results, size, job, speeds) for result in results]
            report.write(rows, header, speeds, args.out, args.profile)
    return int(any(row["problem"].startswith("failed") for row in rows))


def parse(argv) -> argparse.Namespace:
    parser = parser_of(__doc__)
    names = [peer.name for peer in PEERS]
    add = parser.add_argument
    add(
        "--peers",
        nargs="+",
        choices=names,
        metavar="PEER",
        help=f"any of {', '.join(names)} (default: all; at a level without bf16 those in fp32)",
    )
    add("--fasta", type=Path, default=SAMPLE, help="proteins to embed (default: the sample in examples/)")
    add("--residues", type=int, default=10000, help="about how many, in whole batches of the file (default 10000)")
    add("--proteins", type=int, help="instead: so many proteins of mixed lengths, which pad more")
    add("--latency", type=int, nargs="?", const=300, metavar="N", help="instead: one protein of N residues (300)")
    add("--memory", action="store_true", help="resident memory of each peer in place of times")
    add("--profile", action="store_true", help="also where our time goes, from one more run under clocks")
    add("--isa", choices=levels.LEVELS, help="hold everyone to this instruction-set level")
    add("--rounds", type=int, default=3, help="timed runs of each peer (default 3)")
    add("--threads", type=int, help="default: torch's, one per core")
    add("--batch-tokens", type=int, default=4096, help="padded tokens a batch, packed for us (default 4096)")
    add("--model", default="esm1b_t33_650M_UR50S", help="the published model whose sizes to take (default ESM-1b's)")
    add("--layers", type=int, help="fewer layers than the model's, for a quicker look")
    add("--esm-cpp", type=Path, metavar="PYTHON", help="of an environment of its own, in which esm-cpp is installed")
    add("--tiny", action="store_true", help="a toy model: only to see that everything runs")
    add("--seed", type=int, default=0, help="of the random weights")
    add("--out", type=Path, default=Path("out/peers"), help="folder of the results (default out/peers)")
    args = parser.parse_args(argv)
    if canonical_name(args.model) not in published():
        parser.error(f"--model is {args.model!r}; choose one of {', '.join(published())}")
    without_bf16 = args.isa in ("avx2", "avx512")  # where the libraries emulate it, many times slower than fp32
    args.peers = args.peers or [peer.name for peer in PEERS if peer.dtype == "fp32" or not without_bf16]
    return args


def proteins_of(args, whole: Proteins) -> Proteins:
    if args.latency:
        return single(whole, args.latency)
    return choose(whole, args.residues, args.proteins, args.batch_tokens)


def describe(size: Size, whole: Proteins, proteins: Proteins, args) -> dict[str, str]:
    lengths = token_counts(proteins)
    gemm, attention = size.flops(lengths)
    batches, share = padding(proteins, args.batch_tokens)
    _, share_of_whole = padding(whole, args.batch_tokens)
    residues = f"{lengths.sum() - 2 * len(lengths)} residues ({lengths.min() - 2} to {lengths.max() - 2} a protein)"
    weights = f"{size.attention_heads} heads, random weights (seed {args.seed})"
    return {
        "model": f"{args.model}'s sizes: {size.layers} layers x {size.embed_dim}, {weights}",
        "work": f"{len(proteins)} of the {len(whole)} proteins of {args.fasta.name}, {residues}; "
        f"{(gemm + attention) / 1e12:.3g} TFLOP, {attention / (gemm + attention):.1%} of them attention",
        "batches": f"sorted by length, up to {args.batch_tokens} tokens each; {batches} for the peers, of which "
        f"{share:.1%} is padding (in batches of all {len(whole)} proteins: {share_of_whole:.1%}); ours are packed",
        "rounds": f"{args.rounds}, after one verified run",
    }


if __name__ == "__main__":
    sys.exit(main())
