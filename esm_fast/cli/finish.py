"""esm-fast finish: the end of a data set that several processes made."""

import argparse
from pathlib import Path

from .dataset import require_pyarrow
from .verify import check

NAME = "finish"
ORDER = 12
HELP = "verify a data set that several processes made, and mark it as complete"
DESCRIPTION = """\
Does what esm-fast verify does and, where nothing is wrong or missing, writes run.json: the counts,
and a checksum of each shard. esm-fast embed does this by itself where it is the only process."""
EXAMPLES = """\
  esm-fast finish uniref50/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, metavar="OUT", help="the folder of a data set")


def run(args: argparse.Namespace) -> int:
    require_pyarrow()
    from ..dataset.verify import finish

    return check(args, finish)
