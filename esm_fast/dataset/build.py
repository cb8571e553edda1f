"""Making a data set: planned, computed and committed unit by unit, and verified."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ..console import check_space
from ..ops import verdicts
from ..ops.registry import request_of
from ..sequences.fasta import MAX_RECORD
from . import fingerprint, layout, ranks
from .compute import Computer
from .errors import DatasetError
from .plan import Plan
from .plan import load as load_plan
from .planner import make_or_resume
from .reader import Dataset
from .settings import Settings
from .verify import finish
from .worker import Progress, prepare_folders, remaining, work

# A unit is what a crash can lose, and what memory holds three of.
UNIT_RESIDUES, UNIT_RESIDUES_KEPT = 1 << 18, 1 << 16
MEANINGLESS = "random weights: these numbers mean nothing"
_ITEM_BYTES = {"float32": 4, "float16": 2}
_ROW_BYTES = 64  # digest, length, status and page headers


@dataclass(frozen=True)
class Options:
    """What is asked of a data set; see `build_dataset`. Another process can be sent it."""

    inputs: tuple[str, ...]
    folder: Path
    model: str
    layers: tuple[int, ...] = (-1,)
    pool: str = "mean"
    residues: bool = False
    dtype: str = "auto"
    store: str = "float32"
    device: str = "auto"
    backend: str | None = None
    threads: int | None = None
    batch_tokens: int | None = None
    unit_residues: int | None = None
    unknown: str = "error"
    empty: str = "error"
    duplicates: str = "keep"
    overlength: str = "error"
    gaps: str = "error"
    max_record: int = MAX_RECORD

    def __post_init__(self):
        inputs = [self.inputs] if isinstance(self.inputs, (str, Path)) else list(self.inputs)
        if not inputs or not all(isinstance(path, (str, Path)) for path in inputs):
            raise TypeError("a data set is made of FASTA files: give a path, or a list of paths")
        if not isinstance(self.model, (str, Path)):
            raise TypeError("give the model's name or path: the checksum of its file is part of the data set")
        for name, value in {
            "inputs": tuple(map(str, inputs)),
            "folder": Path(self.folder),
            "model": str(self.model),
            "layers": tuple(self.layers),
        }.items():
            object.__setattr__(self, name, value)
        choices = {"pool": tuple(_pools()), "store": tuple(_ITEM_BYTES), "duplicates": ("keep", "skip", "error")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")


@dataclass
class Built:
    """What one process did."""

    plan: Plan
    share: ranks.Share
    progress: Progress
    seconds: float  # of computing
    status: Counter = field(default_factory=Counter)  # of the sequences: all, or those of this share


def build_dataset(
    inputs: str | Path | Iterable[str | Path],
    folder: str | Path,
    *,
    model: str | Path,
    layers: Iterable[int] = (-1,),
    pool: str = "mean",
    residues: bool = False,
    dtype: str = "auto",
    shard: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **options,
) -> Dataset:
    """Makes a data set, or resumes one, and opens it: what `esm-fast embed -o FOLDER/` does.

    Args:
        inputs: FASTA paths (plain, gz, bz2, xz or zst; "-" is standard input).
        folder: of the data set, made if need be; its parent must be there.
        model: a name or path, as `load` takes it.
        layers: 0 (the embedding) to the number of layers, or counted from the last, -1.
        pool: what to keep of a protein: "mean", "max" or "std" over its residues, or "cls".
        residues: whether to keep every residue's numbers as well.
        dtype: to compute in: "float32", "bfloat16", "float16", "int8", or "auto": what a data set that was begun has,
            else the fastest whose error is known, see `esm_fast.inference.dtype`.
        shard: "I/N" for the I-th of N shares, from 0; None for what SLURM or torchrun say, else for everything. A
            share is not finished: when all are there, `esm_fast.dataset.verify.finish(folder)` ends the data set.
        on_progress: called now and then with a Progress, also from the thread that writes; may raise to stop.
        options: the other fields of `Options`: store="float16", device, backend, threads, batch_tokens, unit_residues,
            max_record, and the policies unknown, empty, duplicates, overlength and gaps.

    Raises:
        DatasetError: for a folder that holds another data set (naming the fields that differ) or other files, or whose
        files are damaged. FastaError: for the input. ValueError, TypeError, FileNotFoundError: for arguments.
    """
    asked = Options(inputs, folder, model, layers, pool, residues, dtype, **options)
    return Dataset(build(asked, shard, on_progress).plan.folder)


def build(
    options: Options,
    share: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    load: Callable | None = None,
) -> Built:
    """As `build_dataset`, whose `shard` is share here, with what was done.

    load: loads the model in the type it is given, if not by `Options`.
    """
    require_folder(options.folder)
    mine, load, progress = ranks.share(share), load or loader(options), Progress()

    def note(stage: str) -> Callable:
        return lambda *_: on_progress(progress.at(stage))

    model, settings = loaded(options, load)
    plan = planned(options, settings, note("planning"))
    computer = Computer(model, plan.settings, exact(plan, load), note("computing"))
    work_on(plan, mine, computer, progress, on_progress)
    built = Built(plan, mine, progress, progress.seconds, progress.status)
    if mine.count == 1:
        built.status = finished(plan, progress, on_progress)
    return built


def loaded(options: Options, load: Callable) -> tuple:
    """The model that computes, and what decides the bytes."""
    dtype = chosen_dtype(options)
    fingerprint.of_model(options.model)  # before the load, which then need not read the file to find damage
    with as_begun(options):
        model = load(dtype=dtype)
    return model, settings_of(options, model.config, model.device, dtype)


def require_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DatasetError(f"{folder} is a file; a data set is a folder")
    if not folder.absolute().parent.is_dir():
        raise DatasetError(f"the folder {folder.absolute().parent} does not exist; make it first")


def loader(options: Options) -> Callable:
    """Loads the model of these options, in the type it is given. Another process can be sent it."""
    return partial(_load, options.model, options.device, options.backend, options.threads)


def _load(name: str, device: str, backend: str | None, threads: int | None, *, dtype: str):
    from .. import _C
    from ..inference.load import load

    if threads:
        torch.set_num_threads(threads)
        _C.set_threads(threads)
    model, _ = load(name, device=device, dtype=dtype, backend=backend, packed="auto")
    return model


def chosen_dtype(options: Options) -> str:
    """The type of these options; for "auto" that of the plan which is there: what was begun keeps its bits."""
    return _dtype_and_why(options)[0]


def said_dtype(options: Options) -> Options:
    """The same with the type that was chosen, which is printed."""
    if options.dtype != "auto":
        return options
    dtype, why = _dtype_and_why(options)
    print(f"dtype     {dtype} ({why})", file=sys.stderr)
    return replace(options, dtype=dtype)


def _begun(options: Options) -> Settings | None:
    """Of the data set that is there: what computed it still does, whatever would be chosen today."""
    return load_plan(options.folder).settings if (options.folder / layout.PLAN).exists() else None


def as_begun(options: Options):
    """A context in which a model is loaded for the kernels that the data set was begun with, if it was."""
    begun = _begun(options)
    return verdicts.held(begun.kernels) if begun else nullcontext()


def _dtype_and_why(options: Options) -> tuple[str, str]:
    from ..inference.dtype import fastest

    if options.dtype != "auto":
        return options.dtype, "asked for"
    if begun := _begun(options):
        return begun.dtype, "that of the data set as it was begun"
    return fastest(options.model, options.device, options.backend)


def settings_of(options: Options, config, device, dtype: str) -> Settings:
    """What decides the bytes, but the input. config: of the model; device: that it runs on, here."""
    from ..inference.embed import layer_numbers, token_budget

    return Settings(
        model=fingerprint.of_model(options.model),
        layers=tuple(layer_numbers(_Of(config, device), options.layers)),
        width=config.embed_dim,
        max_residues=config.limit(options.overlength),
        pool=options.pool,
        residues=options.residues,
        store=options.store,
        dtype=dtype,
        backend=options.backend or "auto",
        batch_tokens=token_budget(_Of(config, device), options.batch_tokens),
        unit_residues=options.unit_residues or (UNIT_RESIDUES_KEPT if options.residues else UNIT_RESIDUES),
        kernels=_kernels(options, device),
        **{name: getattr(options, name) for name in ("unknown", "empty", "duplicates", "overlength", "gaps")},
        **fingerprint.of_versions(device),
    )


def _kernels(options: Options, device) -> str:
    """Which kernels compute: those that the plan which is there was begun with, whatever was qualified since."""
    if begun := _begun(options):
        return begun.kernels
    return "" if options.backend else verdicts.current(request_of(device, dtype=torch.float32))


@dataclass
class _Of:
    """What of a model decides the layers and the batches."""

    config: object
    device: object


def planned(options: Options, settings: Settings, on_read: Callable[[], None] = lambda: None) -> Plan:
    """The plan of these options, new or as it is in the folder already."""
    info = {"model": options.model, "sources": [Path(name).name for name in options.inputs]}
    if options.model.startswith("random:"):
        info["warning"] = MEANINGLESS
    inputs = list(options.inputs)
    plan = make_or_resume(options.folder, inputs, settings, info, max_record=options.max_record, on_read=on_read)
    prepare_folders(plan)
    return plan


def work_on(plan: Plan, share: ranks.Share, compute: Callable, progress: Progress, on_progress: Callable) -> None:
    """Computes and commits what is left of a share."""
    units, sizes = remaining(plan, share.rank, share.count), plan.info["unit_residues"]
    mine = sizes[share.rank :: share.count]
    require_space(plan, units)
    progress.already_done = len(mine) - len(units)
    progress.begin("computing", sum(mine), sum(mine) - sum(sizes[unit] for unit in units))
    on_progress(progress)

    def note(committed) -> None:
        progress.add(committed)
        on_progress(progress)

    with verdicts.held(plan.settings.kernels):
        work(plan, units, compute, note)
    progress.done = progress.total  # also the units that another process did meanwhile
    on_progress(progress.at("computing"))


def exact(plan: Plan, load: Callable) -> Callable:
    """Loads the model in float32 when it is first needed; gives None where there is nothing more exact."""
    loaded: list = []

    def once():
        if not loaded:
            try:
                loaded.append(load(dtype="float32") if plan.settings.dtype != "float32" else None)
            except Exception as error:  # the file holds only packed halves, or the backend takes nothing else
                if isinstance(error, MemoryError):
                    raise
                loaded.append(None)
        return loaded[0]

    return once


def require_space(plan: Plan, units: list[int]) -> None:
    """Raises SpaceError where the disk cannot hold about what these units will take."""
    settings, info = plan.settings, plan.info
    item = _ITEM_BYTES[settings.store] * settings.width * len(settings.layers)
    rows = sum(info["unit_rows"][unit] for unit in units) * (item + _ROW_BYTES)
    kept = sum(info["unit_residues"][unit] for unit in units) * item if settings.residues else 0
    check_space(plan.folder, rows + kept)


def finished(plan: Plan, progress: Progress, on_progress: Callable) -> Counter:
    """How many sequences have which status. Raises DatasetError naming what is wrong or missing."""
    progress.begin("verifying", plan.info["residues"])

    def on_unit(residues: int) -> None:
        progress.done += residues
        on_progress(progress.at("verifying"))

    _, found = finish(plan.folder, on_unit)
    if problems := found.problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DatasetError(
            f"{plan.folder} is not complete: {'; '.join(problems[:3])}{more}. Remove the files named and run the same "
            "embed command again"
        )
    return found.status


def _pools() -> tuple[str, ...]:
    from ..inference.outputs import pools

    return tuple(pools("protein"))
