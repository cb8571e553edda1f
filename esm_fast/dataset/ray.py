"""The units of a data set as the work of Ray's actors, on a cluster or on the cores of one machine."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import ray
import ray.exceptions

from ..ops import verdicts
from .build import Options, exact, finished, loaded, loader, planned, require_space, settings_of
from .errors import DatasetError
from .reader import Dataset
from .worker import Progress, remaining

_MOST = 8  # units in a task: within it an actor reads and writes beside computing, between two it does not
_TASKS = 4  # an actor at least, so that none waits long for the last one
_ATTEMPTS = 3  # of a unit whose actors die


def build_dataset(
    inputs: str | Path | Iterable[str | Path],
    folder: str | Path,
    *,
    workers: int,
    cpus: int = 1,
    gpus: float = 0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **options,
) -> Dataset:
    """As `esm_fast.build_dataset`, by `workers` actors.

    The cluster is the one that this process is connected to, or else that ray.init() finds or starts. The input, the
    model and the folder have to be on a disk that all machines share. Units that are on the disk are not computed
    again, so the same call resumes where one was stopped. An actor on another kind of machine, or with other versions
    or another model than the plan's, refuses, and the others do its work. A unit that fails is left out, and the rest
    is done first.

    Args:
        workers: actors. cpus, gpus: of each.
        on_progress, options: see `esm_fast.build_dataset`; there is no `shard`.

    Raises:
        DatasetError: naming units that failed and why, or the difference where every actor refused.
    """
    asked = _everywhere(Options(inputs, folder, **options), cpus)
    needs = {"num_cpus": cpus, "num_gpus": gpus}
    # What needs the actors' hardware takes a second; reading the input, which may take hours, must hold no GPU.
    settings = ray.get(ray.remote(**needs)(_settings).remote(asked))
    plan = ray.get(ray.remote(num_cpus=1)(planned).remote(asked, settings))
    units, progress = remaining(plan, 0, 1), Progress()
    require_space(plan, units)
    sizes = plan.info["unit_residues"]
    progress.begin("computing", sum(sizes), sum(sizes) - sum(sizes[unit] for unit in units))
    progress.already_done = plan.units - len(units)
    on_progress(progress)

    def note(committed) -> None:
        progress.add(committed)
        on_progress(progress)

    failed = _Run(asked, plan.folder, units, workers, needs, note).failed if units else {}
    if failed:
        unit, why = next(iter(sorted(failed.items())))
        raise DatasetError(f"{len(failed)} of {plan.units} units failed, the others are done; unit {unit}: {why}")
    finished(plan, progress, on_progress)
    return Dataset(plan.folder)


def _settings(options: Options):
    """What decides the bytes on this machine, by what the model's file says of itself."""
    return loaded(options, loader(options))[1]


class _Worker:
    """Computes and commits units. An actor has one, and so loads the model once."""

    def __init__(self, options: Options, folder: Path):
        from .compute import Computer
        from .plan import load
        from .planner import require_same

        self.plan, load_model = load(folder), loader(options)
        dtype = self.plan.settings.dtype
        with verdicts.held(self.plan.settings.kernels):
            model = load_model(dtype=dtype)
        require_same(self.plan, settings_of(options, model.config, model.device, dtype))
        self.compute = Computer(model, self.plan.settings, exact(self.plan, load_model))

    def ready(self) -> None:
        """Raises what stopped this actor from starting."""

    def do(self, units: list[int]) -> tuple[list, dict[int, str]]:
        """What was committed, and why the other units failed."""
        with verdicts.held(self.plan.settings.kernels):
            return self._do(units)

    def _do(self, units: list[int]) -> tuple[list, dict[int, str]]:
        from .units import is_done
        from .worker import work

        committed, failed = [], {}
        try:
            work(self.plan, units, self.compute, committed.append)
        except Exception:  # of one of them: each by itself shows which
            for unit in units:
                if is_done(self.plan, unit):
                    continue
                try:
                    work(self.plan, [unit], self.compute, committed.append)
                except Exception as error:
                    failed[unit] = f"{type(error).__name__}: {error}"
        return committed, failed


class _Run:
    """Tasks given to actors as these get ready: what an actor that died had is given again, unit by unit."""

    def __init__(self, options: Options, folder: Path, units: list[int], workers: int, needs: dict, note: Callable):
        self._start = lambda: ray.remote(**needs)(_Worker).remote(options, folder)
        size = max(1, min(_MOST, len(units) // (_TASKS * workers)))
        self._waiting = deque(units[at : at + size] for at in range(0, len(units), size))
        self._died = dict.fromkeys(units, 0)  # how often an actor died of it, or of a task it was in
        self._note = note
        self.failed: dict[int, str] = {}
        self._refusals: list[str] = []
        self._running = {}  # what is waited for -> the actor, and its units
        for _ in range(min(workers, len(self._waiting))):
            self._begin(self._start())
        while self._running:
            (done,), _ = ray.wait(list(self._running), num_returns=1)
            self._end(done, *self._running.pop(done))
        if self._waiting:
            raise DatasetError(f"no actor could work: {self._refusals[0]}")

    def _begin(self, actor) -> None:
        self._running[actor.ready.remote()] = (actor, None)

    def _next(self, actor) -> None:
        if self._waiting:
            units = self._waiting.popleft()
            self._running[actor.do.remote(units)] = (actor, units)

    def _end(self, done, actor, units: list[int] | None) -> None:
        try:
            result = ray.get(done)
        except ray.exceptions.RayActorError as error:
            self._dead(error, units)
            return
        if units is not None:
            committed, failed = result
            self.failed |= failed
            for one in committed:
                self._note(one)
        self._next(actor)

    def _dead(self, error: Exception, units: list[int] | None) -> None:
        if units is None:  # it did not start: it refused, or its machine went
            self._refusals.append(_reason(error))
            return
        for unit in reversed(units):
            self._died[unit] += 1
            if self._died[unit] < _ATTEMPTS or len(units) > 1:
                self._waiting.appendleft([unit])  # alone, so that what kills an actor takes nothing with it
            else:
                self.failed[unit] = f"{_ATTEMPTS} actors died of it ({_reason(error)})"
        if self._waiting:
            self._begin(self._start())


def _reason(error: Exception) -> str:
    """The last line of what Ray says, which is the error itself."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _everywhere(options: Options, cpus: int) -> Options:
    """The same with the paths from the root, since actors work in other folders, and with the cores of an actor."""
    if "-" in options.inputs:
        raise ValueError("standard input does not reach the actors; give files")
    model = str(Path(options.model).absolute()) if Path(options.model).exists() else options.model
    return replace(
        options,
        inputs=tuple(str(Path(path).absolute()) for path in options.inputs),
        folder=options.folder.absolute(),
        model=model,
        threads=options.threads or cpus,
    )
