"""Pairs of commands that write into one folder at once, as process number 1 each where the system has namespaces."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import h5py
import numpy as np

from .outcome import RIGHT, WRONG

_CODE = "import sys; from esm_fast.cli import main; sys.exit(max(main(line.split('|')) for line in sys.argv[1:]))"
_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]


def pairs(count: int, rng: Random, folder: Path) -> Counter:
    try:
        prefix = [] if subprocess.run([*_NAMESPACE, "true"], capture_output=True).returncode else _NAMESPACE
    except FileNotFoundError:
        prefix = []
    for name in "ab":
        text = "".join(f">{name}{i}\n{''.join(rng.choices('ACDEFGHIKLMNPQRSTVWY', k=20))}\n" for i in range(30))
        (folder / f"{name}.fa").write_text(text)
    running = []
    for name in "ab":
        lines = [f"embed|{folder}/{name}.fa|-o|{folder}/{name}{i}.h5" for i in range(count)]
        running.append(subprocess.Popen([*prefix, sys.executable, "-c", _CODE, *lines], stderr=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL))  # fmt: skip
    codes = [process.wait() for process in running]
    outcomes = Counter(_outcome(folder, i) for i in range(count))
    return outcomes if codes == [0, 0] else outcomes + Counter({WRONG: 1})


def _outcome(folder: Path, number: int) -> str:
    """Each file holds its own proteins, all of them, finite."""
    for name in "ab":
        with h5py.File(folder / f"{name}{number}.h5") as file:
            if sorted(file) != sorted(f"{name}{i}" for i in range(30)) or not all(
                np.isfinite(d[:]).all() for d in file.values()
            ):
                return WRONG
    return RIGHT


ATTACKS = {"pairs of `embed -o X.h5` in one folder at once, each process number 1": (100, pairs)}
