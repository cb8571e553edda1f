"""Which units are this process's: unit % count == rank. Nobody talks to anybody."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple


class Share(NamedTuple):
    rank: int
    count: int
    said_by: str  # the flag or the variables that this comes from; empty for a run on its own


def share(flag: str | None = None, environ: Mapping[str, str] = os.environ) -> Share:
    """--shard i/n; else the task of a SLURM array, times the process within it that torchrun or srun started.

    Raises ValueError.
    """
    if flag is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", flag)
        if found is None or not int(found[1]) < int(found[2]):
            raise ValueError(f"--shard is {flag!r}: give I/N with I from 0 to N - 1, such as 0/4")
        return Share(int(found[1]), int(found[2]), "--shard")
    outer, inner = _array(environ), _process(environ)
    names = " and ".join(part.said_by for part in (outer, inner) if part.count > 1)
    return Share(outer.rank * inner.count + inner.rank, outer.count * inner.count, names)


def _array(environ: Mapping[str, str]) -> Share:
    """A SLURM array may begin anywhere and leave numbers out: --array=10-40:10."""
    if "SLURM_ARRAY_TASK_COUNT" not in environ:
        return Share(0, 1, "")
    first, step = _int(environ, "SLURM_ARRAY_TASK_MIN", 0), _int(environ, "SLURM_ARRAY_TASK_STEP", 1)
    count, rank = _int(environ, "SLURM_ARRAY_TASK_COUNT"), _int(environ, "SLURM_ARRAY_TASK_ID") - first
    if rank % step or not 0 <= rank // step < count:
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID {rank + first} does not fit an array of {count} from {first} by {step}; with an "
            "irregular array, give --shard I/N"
        )
    return Share(rank // step, count, "SLURM_ARRAY_TASK_ID")


def _process(environ: Mapping[str, str]) -> Share:
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _checked(environ, "RANK", "WORLD_SIZE")
    if "SLURM_PROCID" in environ and "SLURM_NTASKS" in environ:
        # A batch script sees the tasks it asked for, and is one process until it calls srun, which starts a step.
        in_step = "SLURM_STEP_NUM_TASKS" in environ
        return _checked(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS" if in_step else "SLURM_NTASKS")
    return Share(0, 1, "")


def _checked(environ: Mapping[str, str], rank: str, count: str) -> Share:
    found = Share(_int(environ, rank), _int(environ, count), rank)
    if not 0 <= found.rank < found.count:
        raise ValueError(f"{rank} is {found.rank} and {count} is {found.count}: give --shard I/N")
    return found


def _int(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, None if default is None else str(default))
    try:
        return int(text)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {text!r} and no number; give --shard I/N") from None
