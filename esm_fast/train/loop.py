"""The training loop: what happens in a step, and when a run is validated, logged and saved."""

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .. import weights
from ..models.encoder import Encoder
from ..ops import verdicts
from ..ops.registry import request_of
from . import checkpoint
from .batches import share
from .checkpoint import CheckpointError
from .counted import Counted
from .masking import MaskedBatch, Masker
from .meter import Meter
from .model import MaskedLM, new_model
from .processes import Processes
from .recipe import Recipe, RecipeError, as_dict, initial
from .report import Log, plot
from .running import Agreed, Stopped, asked_to_stop, only_run
from .saving import Saver
from .schedule import LossScale, cooldown_factor, learning_rate, linear_rate
from .sharded import Sharded
from .sources import SORTED, identity_of, require_filled, sources_of
from .store import Store
from .updates import Replicated
from .work import Done, Work, ahead, together

_VALIDATION = -1  # the epoch of every validation: always the same crops and masks
_SKIPPED = 10  # steps in a row that non_finite: skip passes over: more are no accident
_BACK = 3  # times in a row that non_finite: roll_back returns to one checkpoint
_WRITING = ".writing"  # a folder of the run's own: safetensors writes by temporary files, which a kill leaves


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
        require_filled(recipe, self.sources)
        self.esm = _first_model(recipe).to(processes.device)
        self.esm.recompute = recipe.recompute
        lm = MaskedLM(self.esm)
        self.parameters = {name: p for name, p in self.esm.named_parameters() if p.requires_grad}
        kind = Sharded if recipe.sharding == "zero1" and processes.world > 1 else Replicated
        self.updater = kind(recipe, lm, self.parameters, processes)
        self.model: torch.nn.Module = self.updater.model
        self.scale = LossScale(device=processes.device) if recipe.precision == "float16" else None
        self.step = 0
        self.passed = 0  # steps' batches that were passed over by rolling back: step n has those of n + passed
        self.counted = Counted(processes.device)
        self.log: Log | None = None
        self._backs: list[int] = []  # the steps that the run was rolled back to
        self.best: float | None = None  # the lowest held-out loss
        self.kernels = ""  # the choices of `ops.verdicts`

    def train(self, on_step: Callable[[int, dict], None] = lambda step, entry: None) -> None:
        """on_step gets the number of steps done, and that step's numbers where it is logged: between, {}.

        On SIGTERM or SIGUSR1, whichever process gets it, the step is finished and saved, or the next one where there
        are several processes. Raises Stopped then, CheckpointError, FloatingPointError (see `recipe.non_finite`), and
        BusyError where another process trains into the same output.
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
        recipe, processes = self.recipe, self.processes
        self.log = Log(self.output, self.step, recipe.tensorboard) if processes.first else None
        meter, agreed = Meter(recipe, processes.world, started), Agreed(processes)
        with Saver(self._checkpoints, recipe.keep, processes, beside=recipe.async_checkpoints) as saver:
            if recipe.non_finite == "roll_back" and not checkpoint.paths(self._checkpoints):
                self._save(saver)
            try:
                while self._rolled_back(saver, meter, lambda: agreed.ask(bool(asked)), on_step):
                    pass
                agreed.close()
            finally:
                if self.log:
                    self.log.close()
        self.updater.whole()
        if self.log:
            self._publish("model.safetensors")
        processes.wait()

    def _rolled_back(self, saver: Saver, meter: Meter, asked: Callable[[], bool], on_step) -> bool:
        """Steps until the end, or until the run was rolled back: True then. asked: whether to stop."""
        recipe = self.recipe
        for work in ahead(self._work(step + self.passed) for step in range(self.step, recipe.steps)):
            done, entry = self._step(work), {}
            meter.add(work)
            saver.check()
            stop = asked()
            logged, saved = self._due(recipe.log_every), self._due(recipe.save_every)
            validated = self._due(recipe.valid_every) and any(len(source.valid_records) for source in self.sources)
            if logged:
                entry = self._told(done) | meter.read()
            saved |= stop and self.step < recipe.steps
            if (logged or saved or validated) and (back := self._settled(entry, saver)) is not None:
                self._roll_back(back, saver)
                meter.restart()
                return True
            if self.log and logged:
                self.log.add(step=self.step, **entry)
            on_step(self.step, entry)
            with meter.paused():
                if validated:
                    self._validate(self.log)
                if saved:
                    self._save(saver)
            if stop and self.step < recipe.steps:
                saver.wait()
                raise Stopped(f"stopped after step {self.step}, which is saved; the same command resumes")
        return False

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
        parts = [(s.steps.of(step), s.steps.epoch_of(step), s.masker) for s in self.sources]
        work = self._mixed(parts)
        return work if work.batches else work._replace(batches=[_idle(parts)])

    def _mixed(self, parts: Iterable[tuple[np.ndarray, int, Masker]]) -> Work:
        """(records, epoch, masker) of each store. Where one has fewer records than there are processes, they go to
        those that come next."""
        works, first = [], 0
        for records, epoch, masker in parts:
            works.append(self._share(records, epoch, masker, first))
            first += len(records) if len(records) < self.processes.world else 0
        return together(works)

    def _share(self, records: np.ndarray, epoch: int, masker: Masker, first: int = 0) -> Work:
        """first: the process that few records begin with."""
        lengths, world, rank = masker.lengths(records), self.processes.world, self.processes.rank
        shares = share(lengths, min(world, len(records)), self.recipe.batch_tokens) if len(records) else []
        if len(shares) < world:
            rank = (rank - first) % world
        mine = shares[rank] if rank < len(shares) else []
        batches = [masker.batch(records[part], epoch) for part in mine]
        if self.processes.device.type == "cuda":
            batches = [batch.pinned() for batch in batches]
        return Work(batches, lengths, int(masker.selected(records, epoch).sum()))

    def _step(self, work: Work) -> Done:
        """Accumulates the gradient of the mean loss over the step's selected tokens, and updates the parameters, if it
        is finite. Does not wait for the device."""
        self.updater.begin()
        # In fp16 a token's gradient is scaled by the loss scale alone, as in fairseq, whatever the batch and the number
        # of processes; the mean is taken in fp32 afterwards.
        mean, scale = self.updater.factor / max(work.selected, 1), self.scale and self.scale.scale
        total = torch.zeros((), device=self.processes.device)
        for number, masked in enumerate(work.batches, start=1):
            with self.updater.batch(last=number == len(work.batches)):
                loss = self.model(masked.to(self.processes.device))
                (loss * (mean if scale is None else scale)).backward()
            total += loss.detach()
        norm, rate = self._update(None if scale is None else scale.double() / mean)
        return Done(work, total, norm, rate, scale)

    def _update(self, unit: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the gradient's norm and the rate. unit: 1 as the gradients have it, None for 1."""
        rate = self.counted.rate(self._rate, cooldown_factor(self.step, self.recipe.steps, self.recipe.cooldown))
        norm = self.updater.norm() if unit is None else self.updater.norm() / unit
        bad, clip, factor = ~norm.isfinite(), self.recipe.clip, None
        if clip:
            factor = (clip / (norm + 1e-6)).clamp(max=1.0)
        if unit is not None:
            factor = (1.0 if factor is None else factor) / unit
        self.updater.step(rate, factor, bad)
        self.step += 1
        self.counted.saw(bad, self.step)
        if self.scale:
            self.scale.update(bad)
        return norm, rate

    def _rate(self, updates: int) -> float:
        recipe = self.recipe
        if recipe.schedule == "linear":
            return linear_rate(updates, recipe.learning_rate, recipe.warmup, recipe.steps)
        return learning_rate(updates, recipe.learning_rate, recipe.warmup)

    # ---- what the host asks the device, when it logs or saves

    def _told(self, done: Done) -> dict:
        """The step's numbers, for the log."""
        (loss,) = self.processes.sum(float(done.loss))
        norm = float(done.norm)
        entry = {"loss": loss / max(done.work.selected, 1), "learning_rate": float(done.rate)}
        entry |= {"gradient_norm": norm if math.isfinite(norm) else None, "tokens": int(done.work.lengths.sum())}
        if done.scale is not None:
            entry["loss_scale"] = float(done.scale)
        return entry

    def _settled(self, entry: dict, saver: Saver) -> int | None:
        """What became of the steps since the last time. Returns the first one whose gradient was not finite, if the run
        is to be rolled back for it; raises FloatingPointError where it is to stop."""
        seen = self.counted.read()
        if seen.skipped:
            entry["skipped"] = seen.skipped
        if self.scale is not None:
            self.scale.check()
        elif seen.first is not None and self.recipe.non_finite == "roll_back":
            return seen.first
        elif seen.first is not None and (self.recipe.non_finite == "stop" or seen.longest > _SKIPPED):
            what = f"of {seen.longest} steps in a row " if self.recipe.non_finite == "skip" else ""
            step = self.step if what else seen.first
            raise FloatingPointError(
                f"step {step}: the gradient {what}is not finite; {self._newest(saver)}. "
                "Lower the learning rate, lengthen the warm-up or clip gradients"
            )
        return None

    def _newest(self, saver: Saver) -> str:
        saver.wait()
        saved = checkpoint.paths(self._checkpoints)
        return f"the newest checkpoint, from before it, is {saved[-1]}" if saved else "there is no checkpoint yet"

    def _roll_back(self, first: int, saver: Saver) -> None:
        """To the newest checkpoint, after which the batches up to those of step `first` are passed over."""
        saver.wait()
        saved, passed = checkpoint.newest(self._checkpoints, self.processes), self.passed
        if saved is None:
            raise CheckpointError(f"{self._checkpoints} holds no checkpoint to roll back to")
        step = saved.state["step"]
        self._backs = [*(back for back in self._backs if back == step), step]
        if len(self._backs) > _BACK:
            raise FloatingPointError(
                f"step {first}: the gradient is not finite, as after each of {_BACK} returns to {saved.path}, with "
                "other batches. Lower the learning rate, lengthen the warm-up or clip gradients"
            )
        self._take(saved)
        self.passed = passed + first - step
        if self.log:
            said = f"back to step {step}, past the batches of steps {step + 1} to {first}"
            warnings.warn(f"step {first}: the gradient is not finite: {said}", stacklevel=2)
            self.log.close()
            self.log = Log(self.output, step, self.recipe.tensorboard)
            note = {"step": step, "rolled_back_from": first, "passed": self.passed}
            if self.log.last() != note:  # a run that was killed since comes here again
                self.log.add(**note)

    # ---- validation

    @torch.inference_mode()
    def _validate(self, log: Log | None) -> None:
        """The perplexity of held-out proteins, every selected token shown as <mask>, in fp32."""
        self.updater.whole()
        held_out = [source for source in self.sources if len(source.valid_records)]
        work = self._mixed((s.valid_records, _VALIDATION, s.valid_masker) for s in held_out)
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

    def _save(self, saver: Saver) -> None:
        state = {"step": self.step, "updates": self.counted.updates, "passed": self.passed, "best": self.best}
        state["recipe"] = as_dict(self.recipe)
        state |= {"store": identity_of(self.sources), "order": [source.order for source in self.sources]}
        if self.kernels:
            state["kernels"] = self.kernels
        if self.scale:
            state["scale"] = self.scale.state()
        self.updater.whole()
        saver.save(self.step, self.parameters, self.updater, state)

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
        self.step, self.passed = saved.state["step"], saved.state.get("passed", 0)
        self.counted = Counted(self.processes.device, saved.state["updates"])
        self.kernels = saved.state.get("kernels", "")
        orders = saved.state.get("order", [SORTED])
        for source, order in zip(self.sources, orders, strict=False):
            source.keep_order(order)
        if self.scale and "scale" in saved.state:
            self.scale = LossScale(**saved.state["scale"], device=self.processes.device)
        checkpoint.restore(saved, self.parameters, self.updater, saved.state["updates"])


def _idle(parts: Iterable[tuple[np.ndarray, int, Masker]]) -> MaskedBatch:
    """For a process that has no record of a step: a short one without a loss, so that it takes part in every
    exchange."""
    records, epoch, masker = next(part for part in parts if len(part[0]))  # `require_filled` saw that there is one
    return masker.batch(records[[masker.lengths(records).argmin()]], epoch).without_loss()


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
