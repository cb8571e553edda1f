"""Peers verified, then timed in turns, each beside the speed of the machine at that moment."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from breakdown import Breakdown, break_down
from common import Job, Peer, Run, Setup
from machine import gemm_peak, raw_peak
from peers import OURS, PEERS
from torch_peers import fair_esm_logits
from tqdm import tqdm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
# Largest error of any element of any mean embedding, in units of the reference embeddings' root mean square. bf16 holds
# 8 bits: its peers reach 0.03 through 33 layers; a wrong mask, order or position is off by 0.3 and more.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "int8": np.inf}
# esm-cpp approximates GELU and the exponential: in fp32 it is off by 8e-4 through two layers.
ITS_OWN = {"esm-cpp-fp32": 1e-2}
# int8 is held to the smallest cosine of any protein's embedding with the reference's instead.
LEAST_COSINE = {"int8": 0.99}
REFERENCES = ("fair-esm-fp32", "hf-fp32")  # the first one installed is the truth


@dataclass
class Result:
    """What became of one peer: the problem that keeps it out of the table, or its seconds, one per round."""

    peer: Peer
    problem: str = ""
    error: float | None = None  # the worst of all its runs, in the units of TOLERANCE
    cosine: float | None = None  # the smallest of any protein in any run
    seconds: list[float] = field(default_factory=list)
    breakdown: Breakdown | None = None  # of ours


@dataclass
class Speeds:
    """FLOP/s (int8: operations) seen between the runs, per dtype: what the machine gave, whoever ran."""

    torch: dict[str, list[float]]  # torch's own matrix product
    raw: dict[str, list[float]]  # the multiply instruction of our kernels' level, on registers alone
    n: int  # rows and columns of torch's matrices

    @classmethod
    def of(cls, results: list[Result], width: int) -> "Speeds":
        """width: of the model; a toy's product is smaller, as its numbers mean nothing."""
        used = [dtype for dtype in DTYPES if any(result.peer.dtype == dtype for result in results)]
        return cls({dtype: [] for dtype in used}, {dtype: [] for dtype in used}, min(2048, 8 * width))

    def take(self, dtype: str) -> None:
        self.torch[dtype].append(gemm_peak(DTYPES[dtype], self.n))
        if (speed := raw_peak(DTYPES[dtype])) is not None:
            self.raw[dtype].append(speed)


def compare(setup: Setup, job: Job, names: list[str], rounds: int, warm: bool = False) -> tuple[list[Result], Speeds]:
    """Verify the named peers, then time them in turns; `warm` runs each once more, untimed, before each timed run.

    At last ours run once more under clocks.
    """
    results = [Result(peer) for peer in PEERS if peer.name in names]
    speeds = Speeds.of(results, setup.size.embed_dim)
    with tqdm(total=len(results) * (1 + rounds), unit="run", smoothing=0) as bar:
        runs, truths = verify(setup, job, results, bar)
        running = [result for result in results if not result.problem]
        bar.total = len(results) + len(running) * rounds
        for turn in range(rounds):
            for result in running if turn % 2 == 0 else running[::-1]:  # a steady drift of the machine cancels out
                bar.set_description(f"round {turn + 1}: {result.peer.name}")
                speeds.take(result.peer.dtype)
                with problems_of(result):
                    if warm:
                        runs[result.peer.name](job)
                    begin = time.perf_counter()
                    embeddings = runs[result.peer.name](job)
                    result.seconds.append(time.perf_counter() - begin)
                    judge(result, embeddings, truths[result.peer.output])
                bar.update()
        for result in running:
            if result.peer.name.startswith(OURS) and not result.problem:
                speeds.take(result.peer.dtype)
                result.breakdown = break_down(runs[result.peer.name], job)
    return results, speeds


def verify(setup: Setup, job: Job, results: list[Result], bar) -> tuple[dict[str, Run], dict[str, np.ndarray]]:
    """Build each peer and hold its first output, which also warms it up over all shapes, against the reference's.

    Returns the peers' runs and the truth of each kind of output that is needed.
    """
    reference = next((peer for peer in PEERS if peer.name in REFERENCES and not peer.missing(setup)), None)
    if reference is None:
        raise SystemExit("nothing to verify against: pip install 'esm_fast[bench]' for fair-esm and transformers")
    bar.set_description(f"verify: {reference.name}")
    runs = {reference.name: reference.build(setup)}
    truths = {"embeddings": runs[reference.name](job)}
    for result in results:
        peer = result.peer
        bar.set_description(f"verify: {peer.name}")
        if missing := peer.missing(setup):
            result.problem = f"missing: {missing}"
        elif peer is reference:
            judge(result, truths["embeddings"], truths["embeddings"])
        else:
            with problems_of(result):
                if peer.output not in truths:
                    truths["logits"] = fair_esm_logits(setup)(job)
                runs[peer.name] = peer.build(setup)
                judge(result, runs[peer.name](job), truths[peer.output])
        bar.update()
    return runs, truths


@contextmanager
def problems_of(result: Result):
    """A peer that breaks is a result, and must not cost the others theirs."""
    try:
        yield
    except Exception as error:
        result.problem = f"failed: {type(error).__name__}: {error}".splitlines()[0]


def judge(result: Result, embeddings: np.ndarray, truth: np.ndarray) -> None:
    """Record a peer's worst error and cosine; raise if they are beyond its dtype's limit or not numbers."""
    if embeddings.shape != truth.shape:
        raise ValueError(f"embeddings of shape {embeddings.shape} instead of {truth.shape}")
    dtype = result.peer.dtype
    error = float(np.abs(embeddings - truth).max() / np.sqrt(np.mean(truth**2)))
    allowed = ITS_OWN.get(result.peer.name, TOLERANCE[dtype])
    if not error <= allowed:
        raise ValueError(f"error {error:.1e}, allowed {allowed:.0e}")
    cosine = float(cosines(embeddings, truth).min())
    if not cosine >= LEAST_COSINE.get(dtype, -1):
        raise ValueError(f"cosine {cosine:.4f}, allowed {LEAST_COSINE[dtype]}")
    result.error = max(error, result.error or 0.0)
    result.cosine = min(cosine, 1.0 if result.cosine is None else result.cosine)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row of a with the same row of b."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
