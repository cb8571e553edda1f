"""esm-fast verify: whether a data set is complete and intact."""

import argparse
import sys
from pathlib import Path

from .common import human_bytes, progress
from .dataset import SOME_FAILED, require_pyarrow

NAME = "verify"
ORDER = 13
HELP = "check every byte of a data set"
DESCRIPTION = """\
Reads every file of a data set that esm-fast embed made, and compares: the checksums of pages, of
files and of sequences; each record requested with the ids and the skipped; each shard with its
plan. Exits with 1 and names what is wrong or missing; with 3 where all is as it should be but some
proteins have no embedding, for a reason that is recorded."""
EXAMPLES = """\
  esm-fast verify uniref50/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, metavar="OUT", help="the folder of a data set")


def run(args: argparse.Namespace) -> int:
    require_pyarrow()
    from ..dataset.verify import verify

    return check(args, verify)


def check(args: argparse.Namespace, how) -> int:
    from ..dataset.plan import load
    from ..dataset.report import plan_facts, plan_lines

    folder, say = Path(args.dataset), args.summary.say
    with progress(load(folder).info["residues"]) as bar:
        bar.set_description("verifying")
        plan, found = how(folder, bar.update)
    say(dataset=str(folder), problems=found.problems, status=dict(found.status))
    for problem in found.problems:
        print(f"wrong     {problem}", file=sys.stderr)
    if found.problems:
        count = f"{len(found.problems)} problem{'s' * (len(found.problems) > 1)}"
        print(
            f"{folder} is not complete: {count}. Remove the files named and run the same embed command again",
            file=sys.stderr,
        )
        return 1
    say(*plan_lines(plan), **plan_facts(plan))
    say(f"status    {', '.join(f'{count:,} {status}' for status, count in sorted(found.status.items()))}")
    verified = f"verified  {len(found.hashes):,} shards ({human_bytes(found.bytes)})"
    finished = (folder / "run.json").exists()
    say(verified, shards=len(found.hashes), bytes=found.bytes, finished=finished)
    args.summary.time()
    if not finished:
        say(f"next      esm-fast finish {folder} writes run.json, which has the shards' checksums")
    return SOME_FAILED if found.failed else 0
