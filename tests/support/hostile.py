"""Arguments that nobody should give, and calls that are made in child processes, so that a crash is counted.

for outcome in attempts(calls): ...      # calls: (name, a function without arguments)
"""

import os
import pickle
import random
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

HUGE = 2**62


class Labelled(torch.Tensor):
    """A subclass that means nothing by it, as several libraries have one."""


def tensors(value: torch.Tensor, rng: random.Random) -> dict[str, Callable[[], Any]]:
    """Hostile stand-ins of a tensor, by name; each is made when it is asked for."""
    shape, floating = tuple(value.shape), value.is_floating_point()
    other = rng.randrange(max(1, value.ndim))
    found = {
        "none": lambda: None,
        "text": lambda: "x",
        "number": lambda: 1,
        "list": lambda: value.tolist(),
        "array": lambda: value.detach().float().numpy(),
        "empty": lambda: value.new_empty(0),
        "scalar": lambda: value.new_ones(()),
        "no rows": lambda: value[:0] if value.ndim else value,
        "no width": lambda: value[..., :0] if value.ndim else value,
        "shorter": lambda: value.narrow(other, 0, max(0, shape[other] - 1)) if value.ndim else value,
        "one": lambda: value.narrow(other, 0, min(1, shape[other])) if value.ndim else value,
        "longer": lambda: torch.cat([value, value]) if value.ndim else value,
        "deeper": lambda: value[None],
        "flat": lambda: value.flatten(),
        "transposed": lambda: value.mT if value.ndim > 1 else value,
        "meta": lambda: value.to("meta"),
        "int": lambda: value.to(torch.int64),
        "int32": lambda: value.to(torch.int32),
        "uint8": lambda: value.to(torch.uint8),
        "bool": lambda: value.to(torch.bool),
        "complex": lambda: value.to(torch.complex64),
        "half": lambda: value.half() if floating else value.float(),
        "bfloat16": lambda: value.bfloat16(),
        "double": lambda: value.double(),
        "float8": lambda: value.float().to(torch.float8_e4m3fn),
        "sparse": lambda: value.to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        "strided": lambda: torch.stack([value, value], -1)[..., 0],
        "expanded": lambda: value[:1].expand(shape) if value.ndim else value,
        "reversed strides": lambda: value.mT.contiguous().mT if value.ndim > 1 else value,
        "negated": lambda: torch._neg_view(-value) if floating else value,
        "subclass": lambda: value.as_subclass(Labelled),
        "parameter": lambda: nn.Parameter(value.clone(), requires_grad=False),
        "with gradient": lambda: value.clone().requires_grad_() if floating else value,
        "uninitialised": lambda: nn.UninitializedParameter(),
        "freed": lambda: _freed(value),
        "nan": lambda: torch.full_like(value, float("nan")) if floating else value,
        "infinite": lambda: torch.full_like(value, float("inf")) if floating else value,
        "negative": lambda: -value.abs() - 1 if value.dtype != torch.bool else value,
        "huge": lambda: (
            torch.full_like(value, 1e38 if floating else torch.iinfo(value.dtype).max)
            if value.dtype != torch.bool
            else value
        ),
        "beyond 31 bits": lambda: torch.full(shape, HUGE),
        "random": lambda: torch.randint(-40, 40, shape).to(value.dtype),
    }
    return found


def _freed(value: torch.Tensor) -> torch.Tensor:
    """What FSDP and offloading leave of a parameter between its uses."""
    copy = value.clone()
    copy.untyped_storage().resize_(0)
    return copy


PLAIN = {
    "none": None,
    "text": "x",
    "bytes": b"\0",
    "-1": -1,
    "0": 0,
    "3": 3,
    "33": 33,
    "2**31": 2**31,
    "2**62": HUGE,
    "10**30": 10**30,
    "-2**63": -(2**63),
    "1.5": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "-0.5": -0.5,
    "1e308": 1e308,
    "True": True,
    "list": [1],
    "array": np.array([1, 2]),
    "numpy": np.int64(2),
    "dict": {},
    "complex": 1j,
    "object": object(),
    "nothing": "",
    "surrogate": "M\udc80K",
    "NUL": "M\0K",
    "letters of others": "MK\u03b2\U0001f9ec",
    "unclosed token": "MK<mas",
    "tokens": "<mask><cls><pad>.-<unk>",
    "1,000,000 letters": "MK" * 500_000,
    "byte array": bytearray(b"MK"),
    "nested": [["a", ["MK"]]],
}


def stand_ins(value, rng: random.Random) -> dict[str, Callable[[], Any]]:
    """Hostile stand-ins of any argument."""
    if isinstance(value, torch.Tensor):
        return tensors(value, rng)
    return {name: lambda other=other: other for name, other in PLAIN.items()}


class Outcome(NamedTuple):
    """returned: what the call gave, as text; error: the exception's class and message; crash: the signal's number."""

    name: str
    returned: str | None = None
    error: tuple[str, str] | None = None
    crash: int | None = None


_EACH = 20  # seconds of processor time that a call may take


def attempts(calls: Iterable[tuple[str, Callable[[], str]]]) -> Iterator[Outcome]:
    """Makes calls in children: one child makes one after the other, and where it dies the next takes over.

    A call returns a text, which becomes `returned`. A call that hangs dies by SIGPROF.
    """
    calls, done = list(calls), 0
    while done < len(calls):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reading)
            _child(calls[done:], writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            while True:
                try:
                    yield pickle.load(stream)
                except EOFError:
                    break
                done += 1
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            yield Outcome(calls[done][0], crash=os.WTERMSIG(status))
            done += 1


def _child(calls, writing: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)  # of the parent's there are none in a fork
    for name, call in calls:
        signal.setitimer(signal.ITIMER_PROF, _EACH)
        try:
            outcome = Outcome(name, returned=call())
        except BaseException as error:
            outcome = Outcome(name, error=(type(error).__name__, str(error) or traceback.format_exc()))
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(writing, pickle.dumps(outcome))
    os._exit(0)
