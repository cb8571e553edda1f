"""python -m attack [NAME ...] [--times X] [--seed N]: the attacks, as lines of a Markdown table.

Exits with 1 where one had an outcome that must not be.
"""

import argparse
import importlib
import os
import pkgutil
import platform
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

import attack
from attack.outcome import BAD


def attacks(names: list[str]) -> dict:
    """Those of the modules of these names, or of all."""
    found = {}
    for module in pkgutil.iter_modules(attack.__path__):
        if not names or module.name in names:
            found |= getattr(importlib.import_module(f"attack.{module.name}"), "ATTACKS", {})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="attack")
    parser.add_argument("names", nargs="*", help="modules of this package (default: all)")
    parser.add_argument("--times", type=float, default=1, help="as often as by default (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # what is tried runs in forks, which have no other threads
    warnings.simplefilter("ignore")
    print(f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, seed {args.seed}\n")
    print("| tried | how often | what came of it | s |\n|---|--:|---|--:|", flush=True)
    harm = 0
    for title, (count, run) in attacks(args.names).items():
        count, begin = max(1, round(count * args.times)), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            os.environ["ESM_FAST_CACHE"] = f"{folder}/cache"
            outcomes = run(count, random.Random(args.seed), Path(folder))
        harm += sum(number for outcome, number in outcomes.items() if outcome in BAD)
        said = ", ".join(f"{number:,} {outcome}" for outcome, number in sorted(outcomes.items(), key=lambda o: -o[1]))
        print(f"| {title} | {outcomes.total():,} | {said} | {time.perf_counter() - begin:.0f} |", flush=True)
    print(f"\n{harm:,} of these must not be")
    return int(harm > 0)


if __name__ == "__main__":
    sys.exit(main())
