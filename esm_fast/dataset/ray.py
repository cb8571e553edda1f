"""The units of a data set as the work of Ray Data's actors, on a cluster or on the cores of one machine."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray
import ray.data

from ..cli.common import dtype_of, progress
from ..cli.embed_dataset import exact, folder_of, loader, make_plan, require_space

_MOST = 8  # units in a task: within it an actor reads and writes beside computing, between two it does not
_TASKS = 4  # an actor at least, so that none waits long for the last one


def embed(arguments: list[str], workers: int, cpus: int = 1, gpus: float = 0) -> int:
    """`esm-fast embed` with these arguments by `workers` actors, then `esm-fast finish`, whose exit code is returned.

    cpus, gpus: of an actor. They are those of the cluster that this process is connected to, or else of the one that
    ray.init() finds or starts. The input, the model and the data set have to be on a disk that all machines share.
    Units that are on the disk are not computed again, so the same call goes on where one was stopped.
    """
    from ..cli import main
    from ..cli.submit import shared
    from ..dataset.worker import remaining

    args = _everywhere(shared(["embed", *arguments]), cpus)
    needs = {"num_cpus": cpus, "num_gpus": gpus}
    plan, load = ray.get(ray.remote(**needs)(_prepare).remote(args))
    units = remaining(plan, 0, 1)
    require_space(plan, units)
    if units:
        size = max(1, min(_MOST, len(units) // (_TASKS * workers)))
        tasks = ray.data.from_items(units, override_num_blocks=-(-len(units) // size))
        done = tasks.map_batches(
            _Worker,
            fn_constructor_args=(plan, load),
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=workers),
            **needs,
        )
        with progress(sum(plan.info["unit_residues"][unit] for unit in units)) as bar:
            for row in done.iter_rows():
                bar.update(row["residues"])
    return main(["finish", str(plan.folder)])


class _Worker:
    """Computes and commits units. An actor has one, and so loads the model once."""

    def __init__(self, plan, load: Callable):
        from ..dataset.compute import Computer

        self.plan = plan
        self.compute = Computer(load(dtype=plan.fields["dtype"]), plan.fields, exact(plan, load))

    def __call__(self, units: dict[str, np.ndarray]) -> dict[str, list[int]]:
        from ..dataset.worker import work

        committed: list = []
        work(self.plan, units["item"].tolist(), self.compute, committed.append)
        return {"unit": [one.unit for one in committed], "residues": [one.residues for one in committed]}


def _prepare(args: argparse.Namespace):
    """The plan, and what loads its model: made where the actors run, since the hardware is part of the plan."""
    load, dtype = loader(args), dtype_of(args)
    return make_plan(folder_of(args), args, load(dtype=dtype), dtype), load


def _everywhere(args: argparse.Namespace, cpus: int) -> argparse.Namespace:
    """The same with the paths from the root, since actors work in other folders, and with the cores of an actor."""
    args.fasta = [str(Path(path).absolute()) for path in args.fasta]
    args.output = str(Path(args.output).absolute())
    if Path(args.model).exists():
        args.model = str(Path(args.model).absolute())
    args.threads = args.threads or cpus
    return args
