"""The shares of a data set as the jobs of a SLURM array, by submitit; or as processes of this machine."""

import signal
from dataclasses import dataclass
from pathlib import Path

import submitit

from ..cli.dataset import SOME_FAILED, STOPPED

_TIMEOUTS = 1000  # how often a job that reached its time limit is put back: each time it goes on where it stopped


@dataclass
class Request:
    """What each job asks for; None leaves it to the cluster."""

    minutes: int
    cpus: int | None = None
    gpus: int | None = None
    mem_gb: float | None = None
    partition: str | None = None
    account: str | None = None
    options: dict[str, str] | None = None  # of sbatch, by their long names


class Share(submitit.helpers.Checkpointable):
    """A command of esm-fast as a job, which is put back where a signal stopped it."""

    def __call__(self, arguments: list[str]) -> int:
        from ..cli import main

        code = main(arguments)
        if code == STOPPED:
            # SIGTERM is how a preemption begins. submitit puts a job back on a signal of its own choice only.
            signal.raise_signal(getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}"))
        if code not in (0, SOME_FAILED):
            raise RuntimeError(f"esm-fast {arguments[0]} ended with exit code {code}; its message stands above")
        return code


def submit(arguments: list[str], count: int, logs: Path, request: Request, cluster: str) -> list[submitit.Job]:
    """`esm-fast embed` with these arguments as `count` jobs. cluster: "slurm", "local"."""
    executor = _executor(logs, request, cluster)
    shares = [[*arguments, "--shard", f"{rank}/{count}"] for rank in range(count)]
    return executor.map_array(Share(), shares)


def submit_finish(out: str, after: list[submitit.Job], logs: Path, request: Request) -> submitit.Job:
    """`esm-fast finish`, which SLURM starts when all the others have succeeded."""
    array = after[0].job_id.split("_")[0]
    options = {**(request.options or {}), "dependency": f"afterok:{array}"}
    plain = Request(request.minutes, partition=request.partition, account=request.account, options=options)
    return _executor(logs, plain, "slurm").submit(Share(), ["finish", out])


def _executor(logs: Path, request: Request, cluster: str) -> submitit.AutoExecutor:
    executor = submitit.AutoExecutor(logs, cluster=cluster, slurm_max_num_timeout=_TIMEOUTS)
    asked = {
        "name": "esm-fast",
        "timeout_min": request.minutes,
        "cpus_per_task": request.cpus,
        "gpus_per_node": request.gpus,
        "mem_gb": request.mem_gb,
        "slurm_partition": request.partition,
        "slurm_account": request.account,
        "slurm_additional_parameters": {"requeue": True, **(request.options or {})},
    }
    executor.update_parameters(**{name: value for name, value in asked.items() if value is not None})
    return executor
