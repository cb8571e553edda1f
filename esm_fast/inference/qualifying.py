"""The child process of `qualify`: proves and times kernels, and says each step before it does it.

It reads tasks, one JSON line each, from standard input, and answers each on standard output by {"trying": ...} before
and {"done": ...} after. What kills or stops it is so known to its parent by the task that was tried last.
"""

import importlib
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from ..ops import OPS, registry, select, stack_call, verdicts, verify
from ..ops.common import spans
from ..ops.registry import REFERENCE, Case

clock = time.perf_counter  # a test has its own
_ROWS = {"x", "q", "k", "v"}  # arguments with a row for every token
ROUNDS, SECONDS = 5, 0.5  # of timing a case on a backend: rounds at most, and at least 3 even if they take longer


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps({"trying": task}), file=answers, flush=True)
        print(json.dumps({"done": task, "found": _DO[task["do"]](task)}), file=answers, flush=True)


def prove(task: dict) -> list[str]:
    """[outcome, detail] of one backend's kernel: the rule of `ops.verify` on every case, between guards and in memory
    that are NaN; repeated bits, and bits in any batch."""
    op, device = OPS[task["op"]], task["device"]
    dtype = getattr(torch, task["dtype"])
    kernel = next(k for k in registry.kernels(op.name) if k.backend == task["backend"])
    ran = 0
    try:
        for case in map(verify.guarded, [*op.cases(), *bench_cases(task)[:1]]):
            arguments = verify.bound(op, case.build(dtype, device, 0))
            if kernel.why_not(op.request(arguments)):
                continue
            ran += 1
            with _memory_is_nan():
                checks = verify.forward(op, kernel, case, dtype, device)
                checks += verify.gradients(op, kernel, case, dtype, device, draws=3) if task["grad"] else []
            if bad := [check for check in checks if not check.ok]:
                return [
                    "wrong",
                    f"{case.name}, {bad[0].name}: {max(bad[0].largest, bad[0].rms):.3g} of what is allowed",
                ]
            if problem := _bits(op, kernel, arguments):
                return [problem, case.name]
    except Exception as error:  # of any type: a driver's, a compiler's
        return ["wrong", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"]
    return ["proven", f"{ran} cases"] if ran else ["wrong", "no case that it takes"]


def has_heads(op_name: str) -> bool:
    """Whether an op's verdicts are of one size of heads."""
    return not {"heads", "q"}.isdisjoint(OPS[op_name].signature.parameters)


def bench_cases(task: dict) -> list[Case]:
    made = OPS[task["op"]].bench_cases
    return made(task["head_dim"]) if has_heads(task["op"]) else made()


@contextmanager
def _memory_is_nan() -> Iterator[None]:
    """torch fills what it gives with NaN: an element that no program writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@torch.no_grad()
def _bits(op, kernel, arguments: dict) -> str | None:
    first, again = (verify.outputs_of(kernel.forward(*arguments.values())) for _ in range(2))
    if not _equal(first, again):
        return "irreproducible"
    part = _part(arguments)
    if part is None:
        return None
    alone = verify.outputs_of(kernel.forward(*part.values()))
    batches = first, verify.outputs_of(kernel.forward(*_beside_nan(arguments, part).values()))
    same = [_equal([o[: len(a)] for o, a in zip(batch, alone, strict=True)], alone) for batch in batches]
    return None if all(same) else "batch-dependent"


def _part(arguments: dict) -> dict | None:
    """The first sequences, or rows, of a batch by themselves; None for ops whose outputs are no rows of a batch."""
    ends = arguments.get("cu_seqlens")
    if not ({"q", "k", "v"} <= arguments.keys() or "fc1_weight" in arguments or "out_weight" in arguments):
        return None
    if ends is None:
        rows = len(arguments["x"])
        return arguments | {"x": arguments["x"][: rows // 2].clone()} if rows > 1 else None
    lengths = [end - start for start, end in spans(ends)]
    if len(lengths) < 2 or arguments.get("rotary") is not None:
        return None
    keep = lengths[: len(lengths) // 2]
    rows = {n: arguments[n][: sum(keep)].clone() for n in _ROWS & arguments.keys()}
    longest = {"max_seqlen": max(keep)} if "max_seqlen" in arguments else {}
    return arguments | rows | {"cu_seqlens": ends[: len(keep) + 1].clone()} | longest


def _beside_nan(arguments: dict, part: dict) -> dict:
    """The batch with its other rows NaN, which must not reach the part's."""
    poisoned = dict(arguments)
    for name in _ROWS & arguments.keys():
        poisoned[name] = arguments[name].clone()
        poisoned[name][len(part[name]) :] = torch.nan
    return poisoned


def _equal(left, right) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(left, right, strict=True))


def compare(task: dict) -> dict[str, list[float]]:
    """backend -> the median seconds of every bench case, the backends taking turns."""
    op, device, dtype = OPS[task["op"]], task["device"], getattr(torch, task["dtype"])
    kernels = {k.backend: k for k in registry.kernels(op.name) if k.backend in task["backends"]}
    found = {name: [] for name in task["backends"]}
    for case in bench_cases(task):
        arguments = verify.bound(op, case.build(dtype, device, 0))
        if any(kernel.why_not(op.request(arguments)) for kernel in kernels.values()):
            continue
        if task["grad"]:
            calls = {n: partial(verify.projected, partial(op, backend=n), arguments, 0) for n in kernels}
        else:
            calls = {n: partial(k.forward, *arguments.values()) for n, k in kernels.items()}
        with verdicts.held(task.get("choices", "")):
            if "choices" in task and select(op.name, op.request(arguments)).backend == REFERENCE:
                calls[REFERENCE] = partial(_layers, arguments)
            for name, seconds in _times(calls, device, not task["grad"]).items():
                found[name].append(seconds)
    return found


def _layers(arguments: dict) -> None:
    """What runs where nothing runs all layers as one: their halves, by the kernels that are chosen for them."""
    stack_call(None, **arguments)()


def _times(calls: dict, device: str, inference: bool) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.set_grad_enabled(not inference):
        for call in calls.values():
            call()  # compiles, packs, warms
        for number in range(ROUNDS):
            for name, call in calls.items():
                if number < 3 or sum(taken[name]) < SECONDS:
                    _wait(device)
                    start = clock()
                    call()
                    _wait(device)
                    taken[name].append(clock() - start)
    return {name: sorted(times)[len(times) // 2] for name, times in taken.items()}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def ratio(mine: list[float], others: list[float]) -> float:
    """How many times as long, the geometric mean over the cases."""
    return math.exp(sum(math.log(a / b) for a, b in zip(mine, others, strict=True)) / max(1, len(mine)))


_DO = {"prove": prove, "compare": compare}

if __name__ == "__main__":
    main()
