"""Kernels of `gelu_ffn` that are right, wrong in one direction or both, crash and hang, for a machine whose clock is
told what each costs.

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


def _wrong_backward(arguments, kept, grad_outputs):
    """That of the reference, but for the gradient of the last argument that has one."""
    values = [a.detach().requires_grad_(torch.is_tensor(a)) if torch.is_tensor(a) else a for a in arguments]
    tensors = [value for value in values if torch.is_tensor(value)]
    with torch.enable_grad():
        grads = list(torch.autograd.grad(_right(*values), tensors, grad_outputs))
    grads[-1] = grads[-1] * 1.01
    return (*grads, *[None] * (len(values) - len(grads)))


_BACKWARD = {"toy_wrong_grad": _wrong_backward}
TOYS = {
    "toy_fast": _right,
    "toy_slow": _right,
    "toy_near": _right,
    "toy_wrong_grad": _right,
    "toy_neighbour": lambda x, *others: _right(x, *others) + 0 * x[-1],
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
        registry.Kernel(OP, name, TOYS[name], _BACKWARD.get(name), why_not=lambda _: [], yields=lambda _: ["a toy"])
        for name in names
    ]
    kernels[OP] = [*kernels[OP][:-1], *toys, kernels[OP][-1]]


def _priced(kernel):
    def at_its_price(function):
        def run(*arguments):
            _now[0] += _COST.get(kernel.backend, 2.0)
            return function(*arguments)

        return run

    ways = {name: getattr(kernel, name) for name in ("forward", "train", "differentiable")}
    return replace(kernel, **{name: at_its_price(function) for name, function in ways.items() if function})


if os.path.basename(getattr(sys.modules["__main__"], "__file__", "") or "") == "qualifying.py":
    _now = [0.0]
    registry.backends().update(dict.fromkeys(TOYS))  # by name, too, as gradients are asked for
    register(registry._KERNELS)
    few = OPS[OP].cases()[:4]
    OPS[OP] = replace(OPS[OP], cases=lambda: few, bench_cases=lambda: few[:2])
    registry._KERNELS[OP] = [_priced(kernel) for kernel in registry._KERNELS[OP]]
    sys.modules["__main__"].clock = lambda: _now[0]
