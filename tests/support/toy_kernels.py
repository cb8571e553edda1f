"""Kernels of `gelu_ffn` that are right, wrong, crash and hang, for a machine whose clock is told what each costs.

Imported by name into a child of `esm-fast qualify`, it registers them there; a test calls `register`.
"""

import itertools
import os
import signal
import sys
import time
from dataclasses import replace

import torch

from esm_fast.ops import OPS, registry

OP = "gelu_ffn"
_COST = {"toy_fast": 1.0, "toy_slow": 3.0, "toy_near": 1.95}  # of a call; 2 of any other kernel
_calls = itertools.count()


def _right(*arguments):
    return OPS[OP].reference(*arguments)


def _irreproducible(*arguments):
    return _right(*arguments) * (1 + 1e-7 * (next(_calls) % 2))


def _batch(*arguments):
    return _right(*arguments) * (1 + 1.2e-7 * (len(arguments[0]) % 2))


def _crash(*arguments):
    os.kill(os.getpid(), signal.SIGSEGV)


TOYS = {
    "toy_fast": _right,
    "toy_slow": _right,
    "toy_near": _right,
    "toy_wrong": lambda *arguments: _right(*arguments) * 1.001,
    "toy_nan": lambda *arguments: _right(*arguments) * torch.nan,
    "toy_last_row": lambda *arguments: torch.cat([(out := _right(*arguments))[:-1], out[-1:] * 1.01]),
    "toy_raises": lambda *arguments: 1 / 0,
    "toy_irreproducible": _irreproducible,
    "toy_batch": _batch,
    "toy_crash": _crash,
    "toy_hang": lambda *arguments: time.sleep(600),
}


def register(kernels: dict, names=TOYS) -> None:
    """Adds them to the kernels of all ops, after the others, and only by name unless a verdict prefers them."""
    toys = [
        registry.Kernel(OP, name, TOYS[name], why_not=lambda request: [], yields=lambda request: ["a toy"])
        for name in names
    ]
    kernels[OP] = [*kernels[OP][:-1], *toys, kernels[OP][-1]]


def _priced(kernel):
    def forward(*arguments):
        _now[0] += _COST.get(kernel.backend, 2.0)
        return kernel.forward(*arguments)

    return replace(kernel, forward=forward)


if os.path.basename(getattr(sys.modules["__main__"], "__file__", "") or "") == "qualifying.py":
    _now = [0.0]
    registry.backends()
    register(registry._KERNELS)
    few = OPS[OP].cases()[:4]
    OPS[OP] = replace(OPS[OP], cases=lambda: few, bench_cases=lambda: few[:2])
    registry._KERNELS[OP] = [_priced(kernel) for kernel in registry._KERNELS[OP]]
    sys.modules["__main__"].clock = lambda: _now[0]
