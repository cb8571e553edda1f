"""Qualification: every kernel that could run on this machine is proven and timed here, and the best one is chosen.

The work is done in child processes (`qualifying`), so that a crash and a hang are verdicts, and what remains is done by
the next child. Before a kernel is tried, that is written down: not even a machine that stops takes it for proven.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Thread

import torch

from ..ops import OPS, registry, verdicts
from ..ops.registry import REFERENCE
from ..ops.verdicts import MARGIN, PROVEN, TRYING, Key
from .qualifying import has_heads, ratio

WHOLE = "transformer_stack"  # the op that others are the parts of
HEAD_DIM = 64  # ESM-1b's; verdicts of ops with attention are of one size of heads


@dataclass(frozen=True)
class Asked:
    """What to qualify. head_dims: of ops with attention. limit: seconds a kernel. modules: imported by the children
    first, such as a test's toys."""

    device: str
    dtypes: tuple[str, ...]
    grads: tuple[bool, ...] = (False,)
    ops: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = (HEAD_DIM,)
    limit: float = 60.0
    again: bool = False
    modules: tuple[str, ...] = ()


class Watcher:
    """Who is told how far it is; this one does not listen. console.Stages does."""

    def begin(self, stage: str, total: int | None, unit: str) -> None: ...

    def update(self) -> None: ...


def qualify(
    asked: Asked, note: Callable[[str], None] = lambda line: None, watcher: Watcher | None = None
) -> dict[str, dict]:
    """The verdicts of what is asked, which are also written; those that others wrote of this machine stay.

    note: told each verdict in a line. watcher: told as proving begins, as timing begins, and each kernel of them.

    Raises OSError where they cannot be written.
    """
    machine = verdicts.identity(asked.device)
    before, kept = verdicts.read(machine), {}
    with verdicts.held(""):  # defaults are the order's, whatever was qualified before
        for key in _keys(asked):
            request = _request(key, asked.device)
            default = registry.select(key.op, request).backend
            able = [k.backend for k in registry.kernels(key.op) if not k.why_not(request)]
            if able == [REFERENCE]:
                continue
            old = {} if asked.again else before.get(str(key), {}).get("backends", {})
            entry = {"winner": default, "default": default, "seconds": 0.0, "backends": {}}
            # What did not return once is not tried again unasked.
            entry["backends"] |= {b: old[b] for b in able if b in old and old[b][0] in (TRYING, "crashed", "hung")}
            kept[str(key)] = entry
    watcher = watcher or Watcher()
    _prove(asked, machine, kept, note, watcher)
    _compare(asked, machine, kept, note, watcher)
    verdicts.update(machine, kept)
    return kept


def _keys(asked: Asked) -> Iterator[Key]:
    for op_name in asked.ops or OPS:
        for dtype in asked.dtypes:
            for head_dim in asked.head_dims if has_heads(op_name) else (0,):
                for grad in asked.grads:
                    yield Key(op_name, dtype, head_dim, grad)


def _request(key: Key, device: str):
    dtype = getattr(torch, key.dtype)
    return registry.request_of(torch.device(device), dtype=dtype, head_dim=key.head_dim or None, grad=key.grad)


def _prove(asked: Asked, machine: dict, kept: dict, note, watcher: Watcher) -> None:
    tasks = []
    for text, entry in kept.items():
        key = Key.parse(text)
        request = _request(key, asked.device)
        for kernel in registry.kernels(key.op):
            if kernel.backend == REFERENCE:
                entry["backends"][REFERENCE] = (PROVEN, "the definition")
            elif not kernel.why_not(request) and kernel.backend not in entry["backends"]:
                tasks.append({"do": "prove", "backend": kernel.backend} | _task(key, asked))

    def trying(task: dict) -> None:
        kept[task["key"]]["backends"][task["backend"]] = (TRYING, "")
        verdicts.update(machine, kept)

    watcher.begin("proving", len(tasks), "kernels")
    for task, outcome in run(tasks, asked, trying):
        kept[task["key"]]["backends"][task["backend"]] = tuple(outcome)
        note(f"{task['key']:40} {task['backend']:10} {outcome[0]}: {outcome[1]}")
        watcher.update()


def _compare(asked: Asked, machine: dict, kept: dict, note, watcher: Watcher) -> None:
    tasks = []
    for text in kept:
        proven = [b for b, (outcome, _) in kept[text]["backends"].items() if outcome == PROVEN]
        if kept[text]["default"] not in proven:
            kept[text]["winner"] = REFERENCE
        tasks.append({"do": "compare", "backends": proven} | _task(Key.parse(text), asked))
    verdicts.update(machine, kept)
    tasks.sort(key=lambda task: task["op"] == WHOLE)  # after the halves of layers, by which they run otherwise

    def choices(task: dict) -> None:
        if task["op"] == WHOLE and not task["grad"]:
            task["choices"] = verdicts.changed(kept, but=WHOLE)

    watcher.begin("timing", len(tasks), "ops")
    for task, found in run(tasks, asked, choices):
        watcher.update()
        entry = kept[task["key"]]
        if isinstance(found, list):  # it died while it was timed: nothing is chosen for its speed
            note(f"{task['key']:40} not timed: {found[0]}, {found[1]}")
            continue
        choose(entry, found)
        note(f"{task['key']:40} {entry['winner']} runs")


def choose(entry: dict, times: dict[str, list[float]]) -> None:
    """The winner of an entry, and how the others compare with it. times: of the proven backends, by case."""
    if not all(times.values()):
        return
    base = entry["default"] if entry["default"] in times else REFERENCE
    better = [b for b in times if all(a <= MARGIN * c for a, c in zip(times[b], times[base], strict=True))]
    entry["winner"] = min([base, *better], key=lambda backend: ratio(times[backend], times[base]))
    entry["seconds"] = sum(times[entry["winner"]])
    if len(times) == 1:
        return
    for backend in times:
        of = ratio(times[backend], times[entry["winner"]])
        word = (
            f"measured {of:.2f} x the time of {entry['winner']} here" if backend != entry["winner"] else "chosen here"
        )
        entry["backends"][backend] = (PROVEN, word)


def _task(key: Key, asked: Asked) -> dict:
    return {"key": str(key), "device": asked.device} | key._asdict()


# ---- children


def run(tasks: list[dict], asked: Asked, trying: Callable[[dict], None]) -> Iterator[tuple[dict, object]]:
    """Each task with what was found, or [how it ended, why]: "crashed", "hung"."""
    waiting = list(tasks)
    while waiting:
        with _Child(asked) as child:
            while waiting and not child.over:
                task = waiting.pop(0)
                trying(task)
                yield task, child.answer(task)


class _Child:
    def __init__(self, asked: Asked):
        self._limit, self.over = asked.limit, False
        command = [sys.executable, "-m", f"{__package__}.qualifying", *asked.modules]
        quiet = {"stderr": subprocess.DEVNULL}
        # Verdicts are no matter for who makes them.
        environment = os.environ | {"ESM_FAST_VERDICTS": verdicts.OFF}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, **quiet
        )
        self._lines: Queue = Queue()
        Thread(target=self._read, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def answer(self, task: dict) -> object:
        """What the child finds for a task, or how it ended of it."""
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        while True:
            try:
                line = self._lines.get(timeout=self._limit)
            except Empty:
                self.over = True
                return ["hung", f"no answer within {self._limit:g} s"]
            if line is None:
                self.over = True
                code = self._process.wait()
                return ["crashed", f"signal {-code}" if code < 0 else f"exit code {code}"]
            message = json.loads(line)
            if "done" in message:
                return message["found"]
