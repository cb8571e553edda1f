"""The training loop: what happens in a step, and when a run is validated, logged and saved."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import weights
from ..models.encoder import Encoder
from ..ops import verdicts
from ..ops.registry import request_of
from . import checkpoint
from .batches import Steps, share
from .checkpoint import CheckpointError
from .masking import MaskedBatch, Masker
from .model import MaskedLM, new_model, training_flops
from .order import Permuted
from .processes import Processes
from .recipe import Recipe, RecipeError, as_dict, initial
from .report import Log, plot
from .running import Stopped, asked_to_stop, only_run
from .schedule import LossScale, cooldown_factor, learning_rate, linear_rate
from .sharded import Sharded
from .sources import SORTED, identity_of, sources_of
from .store import Store
from .updates import Replicated

_VALIDATION = -1  # the epoch of every validation: always the same crops and masks
_SKIPPED = 10  # steps in a row that non_finite: skip passes over: more are no accident
_WRITING = ".writing"  # a folder of the run's own: safetensors writes by temporary files, which a kill leaves


class Work(NamedTuple):
    """A process's share of a step."""

    batches: list[MaskedBatch]
    lengths: np.ndarray  # tokens of every sequence of the step, those of other processes too
    selected: int  # tokens of the step, likewise


class Trainer:
    """A run: `train` takes it from its newest checkpoint, or the beginning, to the end."""

    def __init__(
        self,
        recipe: Recipe,
        stores: Store | Sequence[tuple[Store, float]],
        processes: Processes,
        *,
        fork: str | Path | None = None,
    ):
        """stores: one, or several with weights: their shares of each step's tokens.
        fork: the output of another run, from whose newest checkpoint this one begins: its weights, moments and
        numbers of steps; everything but the model may be different from there on."""
        self.recipe, self.processes, self.output = recipe, processes, Path(recipe.output)
        self.fork = None if fork is None else Path(fork)
        self.sources = sources_of(recipe, stores)
        self.esm = _first_model(recipe).to(processes.device)
        self.esm.recompute = recipe.recompute
        lm = MaskedLM(self.esm)
        self.parameters = {name: p for name, p in self.esm.named_parameters() if p.requires_grad}
        kind = Sharded if recipe.sharding == "zero1" and processes.world > 1 else Replicated
        self.updater = kind(recipe, lm, self.parameters, processes)
        self.model: torch.nn.Module = self.updater.model
        self.scale = LossScale() if recipe.precision == "float16" else None
        self.step = self.updates = 0
        self.skipped = 0  # steps in a row whose gradient was not finite
        self.best: float | None = None  # the lowest held-out loss
        self.kernels = ""  # the choices of `ops.verdicts`

    def train(self, on_step: Callable[[int, dict], None] = lambda step, entry: None) -> None:
        """on_step gets the number of steps done, and that step's numbers.

        On SIGTERM or SIGUSR1, whichever process gets it, the step is finished and saved. Raises Stopped then,
        CheckpointError, and BusyError where another process trains into the same output.
        """
        with only_run(self.output, self.processes), asked_to_stop() as asked, _deterministic(self.recipe.deterministic):
            # The first process's choice of kernels is everyone's, and a resumed run's that of its checkpoint.
            request = request_of(self.processes.device, dtype=torch.float32, grad=True)
            self.kernels = self.processes.gather(verdicts.current(request))[0]
            started = time.perf_counter()
            self._resume()
            with verdicts.held(self.kernels):
                self._train(on_step, asked, started)

    def _train(self, on_step: Callable[[int, dict], None], asked: list[int], started: float) -> None:
        recipe, stepping = self.recipe, 0.0
        log = Log(self.output, self.step, recipe.tensorboard) if self.processes.first else None
        began, tokens, flops = time.perf_counter(), 0, 0.0
        for work in _ahead(self._work(step) for step in range(self.step, recipe.steps)):
            entry = self._step(work, asked)
            self.step += 1
            tokens, flops, stop = tokens + int(work.lengths.sum()), flops + entry.pop("flops"), entry.pop("stop")
            if self._due(recipe.log_every):
                now = time.perf_counter()
                seconds, stepping = now - began, stepping + now - began
                entry |= {"tokens_per_second": tokens / seconds, "mfu": self._mfu(flops / seconds)}
                entry["goodput"] = stepping / (now - started)
                if log:
                    log.add(step=self.step, **entry)
                began, tokens, flops = time.perf_counter(), 0, 0.0
            on_step(self.step, entry)
            if self._due(recipe.valid_every) and any(len(source.valid_records) for source in self.sources):
                paused = time.perf_counter()
                self._validate(log)
                began += time.perf_counter() - paused
            if self._due(recipe.save_every):
                paused = time.perf_counter()
                self._save()
                began += time.perf_counter() - paused
            if stop and self.step < recipe.steps:
                if not self._due(recipe.save_every):
                    self._save()
                if log:
                    log.close()
                raise Stopped(f"stopped after step {self.step}, which is saved; the same command resumes")
        self.updater.whole()
        if log:
            log.close()
            self._publish("model.safetensors")
        self.processes.wait()

    def _publish(self, name: str) -> None:
        """Writes the model as it is into the output, whole or not at all."""
        folder = self.output / _WRITING
        folder.mkdir(exist_ok=True)
        weights.save(self.esm, folder / name)
        (folder / name).replace(self.output / name)
        folder.rmdir()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.recipe.steps

    # ---- one step

    def _work(self, step: int) -> Work:
        return _together([self._share(s.steps.of(step), s.steps.epoch_of(step), s.masker) for s in self.sources])

    @property
    def masker(self) -> Masker:
        """The first store's."""
        return self.sources[0].masker

    @property
    def steps(self) -> Steps | Permuted:
        return self.sources[0].steps

    def _share(self, records: np.ndarray, epoch: int, masker: Masker) -> Work:
        lengths = masker.lengths(records)
        ranks = min(self.processes.world, len(records)) if epoch == _VALIDATION else self.processes.world
        shares = share(lengths, ranks, self.recipe.batch_tokens)
        mine = shares[self.processes.rank] if self.processes.rank < ranks else []  # few held-out proteins
        batches = [masker.batch(records[part], epoch) for part in mine]
        return Work(batches, lengths, int(masker.selected(records, epoch).sum()))

    def _step(self, work: Work, asked: Sized = ()) -> dict:
        """Accumulates the gradient of the mean loss over the step's selected tokens, and updates the parameters."""
        self.updater.begin()
        # In fp16 a token's gradient is scaled by the loss scale alone, as in fairseq, whatever the batch and the number
        # of processes; the mean is taken in fp32 afterwards.
        scale, mean = self.scale.scale if self.scale else 1.0, self.updater.factor / max(work.selected, 1)
        factor, unit = (scale, scale / mean) if self.scale else (mean, 1.0)
        total = torch.zeros((), device=self.processes.device)
        for number, masked in enumerate(work.batches, start=1):
            with self.updater.batch(last=number == len(work.batches)):
                loss = self.model(masked.to(self.processes.device))
                (loss * factor).backward()
            total += loss.detach()
        rate = self._rate()
        norm = self._update(rate, unit)
        loss, stop = self.processes.sum(float(total), float(len(asked)))
        loss /= max(work.selected, 1)
        entry = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "tokens": int(work.lengths.sum())}
        if self.scale:
            entry["loss_scale"] = scale
        return entry | {"stop": stop > 0, "flops": training_flops(self.recipe.model, work.lengths, work.selected)}

    def _rate(self) -> float:
        recipe = self.recipe
        if recipe.schedule == "linear":
            rate = linear_rate(self.updates, recipe.learning_rate, recipe.warmup, recipe.steps)
        else:
            rate = learning_rate(self.updates, recipe.learning_rate, recipe.warmup)
        return rate * cooldown_factor(self.step, recipe.steps, recipe.cooldown)

    def _update(self, rate: float, unit: float) -> float | None:
        """Returns the gradient's norm; None where it overflowed and the step was skipped. unit: 1 as the gradients have
        it."""
        norm = self.updater.norm() / unit
        if not math.isfinite(norm):
            self._not_finite(norm)
            return None
        self.skipped = 0
        clip = self.recipe.clip
        factor = min(1.0, clip / (norm + 1e-6)) / unit if clip else 1 / unit
        self.updater.step(rate, factor)
        self.updates += 1
        if self.scale:
            self.scale.update()
        return norm

    def _not_finite(self, norm: float) -> None:
        """The step is skipped, or the run stops."""
        self.skipped += 1
        if self.scale is not None:
            self.scale.overflow()
        elif self.recipe.non_finite == "stop" or self.skipped > _SKIPPED:
            what = f"of {self.skipped} steps in a row " if self.skipped > 1 else ""
            raise FloatingPointError(
                f"step {self.step + 1}: the gradient {what}is not finite (norm {norm}); the last checkpoint is from "
                "before it. Lower the learning rate, lengthen the warm-up or clip gradients"
            )

    def _mfu(self, flops_per_second: float) -> float | None:
        peak = self.recipe.peak_tflops
        return flops_per_second / (peak * 1e12 * self.processes.world) if peak else None

    # ---- validation

    @torch.inference_mode()
    def _validate(self, log: Log | None) -> None:
        """The perplexity of held-out proteins, every selected token shown as <mask>, in fp32."""
        self.updater.whole()
        held_out = [source for source in self.sources if len(source.valid_records)]
        work = _together([self._share(s.valid_records, _VALIDATION, s.valid_masker) for s in held_out])
        model = MaskedLM(self.esm)
        total = sum(float(model(masked.to(self.processes.device))) for masked in work.batches)
        loss = self.processes.sum(total)[0] / max(work.selected, 1)
        if log:
            log.add(step=self.step, valid_loss=loss, valid_perplexity=math.exp(loss), valid_selected=work.selected)
            if self.best is None or loss < self.best:
                self._publish("best.safetensors")
            if self.recipe.plot:
                plot(log.path, self.output / "curves.png")
        self.best = loss if self.best is None else min(self.best, loss)

    # ---- checkpoints

    def _save(self) -> None:
        state = {"step": self.step, "updates": self.updates, "best": self.best, "recipe": as_dict(self.recipe)}
        state |= {"store": identity_of(self.sources), "order": [source.order for source in self.sources]}
        if self.kernels:
            state["kernels"] = self.kernels
        if self.scale:
            state["scale"] = vars(self.scale)
        self.updater.whole()
        holders = self.parameters, self.updater
        checkpoint.save(self._checkpoints, self.step, *holders, state, self.recipe.keep, self.processes)

    @property
    def _checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def _resume(self) -> None:
        """Resumes from the newest checkpoint of this very run. Raises CheckpointError where it is another's."""
        if self.processes.first:
            checkpoint.remove_partial(self._checkpoints)
            if not (self.output / _WRITING).is_symlink():
                shutil.rmtree(self.output / _WRITING, ignore_errors=True)
        self.processes.wait()
        saved, more = checkpoint.newest(self._checkpoints, self.processes), {}
        if saved is not None:
            self._restore(saved)
        elif self.fork is not None:
            more = {"forked_from": self._begin_as(self.fork)}
        if self.processes.first:
            text = json.dumps(as_dict(self.recipe) | {"world": self.processes.world} | more, indent=2)
            (self.output / "recipe.json").write_text(text + "\n")

    def _restore(self, saved: checkpoint.Saved) -> None:
        problems = self.recipe.differences(saved.state["recipe"])
        if saved.state["store"] != identity_of(self.sources):
            paths = ", ".join(str(source.store.path) for source in self.sources)
            problems.append(f"{paths}: other data, or other shares of it")
        if problems:
            raise CheckpointError(f"{saved.path} is of another run: {'; '.join(problems)}; choose another output")
        self.best = saved.state["best"]
        self._take(saved)

    def _begin_as(self, other: Path) -> str:
        """Takes over the newest checkpoint of another run, which is left as it is. Returns its path."""
        saved = checkpoint.newest(other / "checkpoints", self.processes, aside=False)
        if saved is None:
            raise CheckpointError(f"{other} holds no checkpoint to fork; give the output folder of a run")
        model = as_dict(self.recipe)["model"]
        if saved.state["recipe"]["model"] != model:
            raise CheckpointError(
                f"{saved.path} is of another model, {saved.state['recipe']['model']}; this is {model}"
            )
        if saved.state["step"] >= self.recipe.steps:
            raise CheckpointError(
                f"{saved.path} is after {saved.state['step']} steps, and steps is {self.recipe.steps}, of all; raise it"
            )
        self._take(saved)
        return str(saved.path)

    def _take(self, saved: checkpoint.Saved) -> None:
        self.step, self.updates = (saved.state[name] for name in ("step", "updates"))
        self.kernels = saved.state.get("kernels", "")
        orders = saved.state.get("order", [SORTED])
        for source, order in zip(self.sources, orders, strict=False):
            source.keep_order(order)
        if self.scale and "scale" in saved.state:
            self.scale = LossScale(**saved.state["scale"])
        checkpoint.restore(saved, self.parameters, self.updater, self.updates)


def _first_model(recipe: Recipe) -> Encoder:
    if recipe.init is None:
        return new_model(recipe.model, recipe.seed, recipe.init_std, attention=recipe.attention)
    found = initial(recipe.init)
    if found.config != recipe.model:
        raise RecipeError(f"init is {recipe.init!r}, a model of other sizes: {found.config}; leave the entry model out")
    return weights.build(found, dtype=torch.float32)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Torch takes algorithms whose results are always the same, and raises where an operation has none."""
    if not wanted:
        yield
        return
    before = torch.get_deterministic_debug_mode()  # off, warn or raise
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for, before its first product
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _together(works: list[Work]) -> Work:
    """Of several stores, in one step."""
    batches = [batch for work in works for batch in work.batches]
    return Work(batches, np.concatenate([work.lengths for work in works]), sum(work.selected for work in works))


def _ahead(items: Iterable[Work]) -> Iterator[Work]:
    """The items of an iterator, the next one made while the current one is used."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, iterator, None)
            yield item
