"""A data set's process killed at a random moment, and its command given again: the bytes of an undisturbed run."""

import hashlib
import os
import signal
import time
from collections import Counter
from pathlib import Path
from random import Random

from forks import Forks

from .outcome import RIGHT, WRONG


def _contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".plan.lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kills(count: int, rng: Random, folder: Path) -> Counter:
    fasta, outcomes = folder / "in.fa", Counter()
    residues = "ACDEFGHIKLMNPQRSTVWY"
    texts = ["".join(rng.choices(residues, k=rng.randrange(5, 120))) for _ in range(60)]
    fasta.write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(texts)))
    command = ["embed", fasta, "-o"]
    options = ["--unit-residues", 300, "--residues"]
    with Forks() as forks:
        for name in ("first", "clean"):  # what forks starts with is imported in the first
            begin = time.perf_counter()
            forks.run([*command, folder / name, *options])
        seconds, wanted = time.perf_counter() - begin, _contents(folder / "clean")
        number = 0
        while outcomes.total() < count:
            out, number = folder / f"run{number}", number + 1
            pid = forks.start([*command, out, *options])
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            if forks.wait(pid) != -signal.SIGKILL:
                continue  # it was done
            done = forks.run([*command, out, *options]) == 0 and _contents(out) == wanted
            outcomes["to the same bytes" if done and RIGHT else WRONG] += 1
    return outcomes


ATTACKS = {"kill -9 of `embed -o OUT/` at random times, then resumed": (60, kills)}
