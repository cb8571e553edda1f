"""Memory that a run takes over the weights, each peer in a process of its own. Linux only: it reads /proc."""

import ctypes
import gc
import multiprocessing
from pathlib import Path

from common import Job, Setup
from peers import PEERS
from random_weights import random_state

COLUMNS = {"peer": "{}", "weights": "{:.0f}", "after load": "{:.0f}", "peak": "{:.0f}", "peak - load": "{:.0f}"}
ITEM_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(names: list[str], setup_of: tuple, job: Job) -> list[dict]:
    """A line a peer, in MB: resident memory after loading, and the most of it while the job runs twice.

    setup_of: (size, seed, batch_tokens, calibration), from which each process makes its own weights. A peer that
    computes in a process of its own is left out: this one's memory is not what it takes.
    """
    lines, (size, _, batch_tokens, calibration) = [], setup_of
    for peer in (peer for peer in PEERS if peer.name in names):
        if missing := peer.missing(Setup(size, {}, batch_tokens, calibration)):
            lines.append({"peer": peer.name, "problem": f"missing: {missing}"})
            continue
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            try:
                lines.append(fresh.apply(measure, (peer.name, setup_of, job)))
            except Exception as error:
                lines.append({"peer": peer.name, "problem": f"failed: {type(error).__name__}: {error}"})
    return lines


def measure(name: str, setup_of: tuple, job: Job) -> dict:
    """One peer in this process, which has to be fresh: what others freed could be used again unnoticed."""
    peer = next(peer for peer in PEERS if peer.name == name)
    size, seed, batch_tokens, calibration = setup_of
    state = random_state(size, seed)
    weights = sum(tensor.numel() for tensor in state.values()) * ITEM_BYTES[peer.dtype]
    run = peer.build(Setup(size, state, batch_tokens, calibration))
    del state
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    loaded = _status("VmRSS")
    _CLEAR.write_text("5")  # the peak begins again at what is resident
    run(job)
    run(job)
    peak = _status("VmHWM")
    return {
        "peer": name,
        "problem": "",
        "weights": weights / 1e6,
        "after load": loaded / 1e6,
        "peak": peak / 1e6,
        "peak - load": (peak - loaded) / 1e6,
    }


def _status(field: str) -> int:
    """Bytes, from a line such as 'VmRSS:  1234 kB'."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
