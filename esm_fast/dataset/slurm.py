"""The shares of a data set as the jobs of a SLURM array, by submitit; or as processes of this machine."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import submitit

from ..console.summary import Summary
from .build import Options, build
from .report import SOME_FAILED, STOPPED, Watch, tell_end, tell_share
from .stopping import StoppedError, stop_signals

_TIMEOUTS = 1000  # how often a job that reached its time limit is put back: each time it resumes where it stopped


@dataclass
class Resources:
    """What each job asks for; None leaves it to the cluster."""

    minutes: int
    cpus: int | None = None
    gpus: int | None = None
    mem_gb: float | None = None
    partition: str | None = None
    account: str | None = None
    options: dict[str, str] | None = None  # of sbatch, by their long names


class Share(submitit.helpers.Checkpointable):
    """A share as a job, which is put back where a signal stopped it."""

    def __call__(self, options: Options, share: str, log: str | None = None) -> int:
        code = self.run(options, share, log)
        if code == STOPPED:
            # SIGTERM is how a preemption begins. submitit puts a job back on a signal of its own choice only.
            signal.raise_signal(getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}"))
        if code not in (0, SOME_FAILED):
            raise RuntimeError(f"the share {share} ended with exit code {code}; its message stands above")
        return code

    def run(self, options: Options, share: str, log: str | None) -> int:
        from . import ranks

        tell_share(ranks.share(share))
        try:
            with stop_signals() as check, Watch(log, check) as watch:
                return tell_end(build(options, share, watch), Summary().say)
        except StoppedError:
            print(f"stopped   the same command resumes {options.folder}", file=sys.stderr)
            return STOPPED


def finish(folder: Path) -> int:
    """Verifies a data set and ends it, as `esm-fast finish`. Raises DatasetError where it is not complete."""
    from .errors import DatasetError
    from .verify import finish as verified

    plan, found = verified(folder)
    if found.problems:
        raise DatasetError(f"{plan.folder} is not complete: {'; '.join(found.problems[:3])}")
    print(f"finished  {folder}: {sum(found.status.values()):,} sequences, {found.failed:,} of them without numbers")
    return SOME_FAILED if found.failed else 0


def submit(
    options: Options, count: int, logs: Path, resources: Resources, cluster: str, log: str | None = None
) -> list[submitit.Job]:
    """A data set as `count` jobs. cluster: "slurm", "local". log: of a JSON line a unit."""
    executor = _executor(logs, resources, cluster)
    shares = [f"{rank}/{count}" for rank in range(count)]
    return executor.map_array(Share(), [options] * count, shares, [log] * count)


def submit_finish(folder: Path, after: list[submitit.Job], logs: Path, resources: Resources) -> submitit.Job:
    """`finish`, which SLURM starts when all the others have succeeded."""
    array = after[0].job_id.split("_")[0]
    more = {**(resources.options or {}), "dependency": f"afterok:{array}"}
    plain = Resources(resources.minutes, partition=resources.partition, account=resources.account, options=more)
    return _executor(logs, plain, "slurm").submit(finish, folder)


def _executor(logs: Path, resources: Resources, cluster: str) -> submitit.AutoExecutor:
    executor = submitit.AutoExecutor(logs, cluster=cluster, slurm_max_num_timeout=_TIMEOUTS)
    asked = {
        "name": "esm-fast",
        "timeout_min": resources.minutes,
        "cpus_per_task": resources.cpus,
        "gpus_per_node": resources.gpus,
        "mem_gb": resources.mem_gb,
        "slurm_partition": resources.partition,
        "slurm_account": resources.account,
        "slurm_additional_parameters": {"requeue": True, **(resources.options or {})},
    }
    executor.update_parameters(**{name: value for name, value in asked.items() if value is not None})
    return executor
