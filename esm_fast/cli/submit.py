"""esm-fast submit: esm-fast embed as many jobs of a cluster."""

import argparse
import shutil
from pathlib import Path

from .common import InputError, cores
from .dataset import SOME_FAILED, is_dataset
from .embed_dataset import options_of
from .numbers import above_0, positive

NAME = "submit"
ORDER = 11
HELP = "a data set as jobs of a SLURM cluster"
DESCRIPTION = """\
Submits esm-fast embed -o OUT/ as a SLURM array, a share of the data set a job, and esm-fast finish as
a job that follows when all have succeeded. A job that is preempted or reaches its time limit is put
back and resumes where it stopped. The folder of the data set and the input have to be on a disk that
all machines share. Options of submit stand before the word embed, those of embed after it."""
EXAMPLES = """\
  esm-fast submit --nodes 16 --gpus 1 --hours 12 --partition gpu \\
      embed uniref50.fasta.gz -o uniref50/ --model MODEL --overlength window
  esm-fast submit --nodes 4 --slurm constraint=a100 --slurm qos=low embed proteome.fasta -o proteome/
  esm-fast submit --nodes 2 --local embed proteome.fasta -o proteome/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=positive, required=True, metavar="N", help="jobs, of one machine each")
    parser.add_argument("--cpus", type=positive, metavar="N", help="cores of a job")
    parser.add_argument("--gpus", type=positive, metavar="N", help="GPUs of a job, of which it uses one")
    parser.add_argument("--mem-gb", type=above_0, metavar="X", help="memory of a job")
    parser.add_argument("--hours", type=above_0, default=24, metavar="X", help="time limit (default: %(default)s)")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="KEY=VALUE", help="any other long option of sbatch; repeatable"
    )
    parser.add_argument("--logs", metavar="DIR", help="submitit's folder: logs of the jobs (default: OUT.jobs)")
    parser.add_argument("--local", action="store_true", help="processes of this machine instead; waits, and finishes")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="embed ...", help="the command of one process")


def run(args: argparse.Namespace) -> int:
    embed = shared(args.arguments)
    if args.local and not embed.threads:  # together they have this machine's cores, and not each all of them
        embed.threads = max(1, cores() // args.nodes)
    slurm, resources = _slurm(args)
    if not args.local and shutil.which("sbatch") is None:
        raise InputError("this machine has no sbatch: submit where SLURM is, or give --local for processes here")
    options = options_of(embed)
    logs = Path(args.logs or f"{embed.output.rstrip('/')}.jobs")
    cluster = "local" if args.local else "slurm"
    jobs = slurm.submit(options, args.nodes, logs, resources, cluster, embed.log_json)
    names = [job.job_id for job in jobs]
    args.summary.say(f"jobs      {' '.join(names)}", f"logs      {logs}", jobs=names, logs=str(logs))
    if args.local:
        return _wait(args, jobs, embed.output, logs)
    last = slurm.submit_finish(options.folder, jobs, logs, resources).job_id
    args.summary.say(f"finish    {last}, when all have succeeded", finish=last)
    return 0


def shared(arguments: list[str]) -> argparse.Namespace:
    """The arguments of a data set's command, which is one that several processes may share."""
    from . import parser

    if arguments[:1] != ["embed"]:
        raise InputError("give the command to share at the end: esm-fast submit --nodes N embed FASTA -o OUT/ ...")
    embed = parser().parse_args(arguments)
    if not is_dataset(embed.output):
        raise InputError(f"{embed.output} is one file, which one process writes; give a folder, -o NAME/")
    if embed.shard:
        raise InputError("each job gets its --shard by itself; leave it out")
    if "-" in embed.fasta:
        raise InputError("standard input does not reach the jobs; give files")
    return embed


def _slurm(args: argparse.Namespace):
    """esm_fast.dataset.slurm, and what is asked of the cluster."""
    options = dict(pair.partition("=")[::2] for pair in args.slurm)
    if "" in options or "" in options.values():
        raise InputError(f"--slurm {' '.join(args.slurm)}: give KEY=VALUE, such as --slurm qos=low")
    try:
        from ..dataset import slurm
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        raise InputError("submit needs submitit: pip install 'esm_fast[slurm]'") from None
    minutes = max(1, round(60 * args.hours))
    return slurm, slurm.Resources(minutes, args.cpus, args.gpus, args.mem_gb, args.partition, args.account, options)


def _wait(args: argparse.Namespace, jobs: list, out: str, logs: Path) -> int:
    from . import finish

    failed = [job.job_id for job in jobs if job.exception() is not None]
    if failed:
        raise InputError(f"{len(failed)} of {len(jobs)} jobs failed; {logs}/{failed[0]}_0_log.err says why")
    args.dataset = out
    return max(finish.run(args), SOME_FAILED * any(job.result() == SOME_FAILED for job in jobs))
