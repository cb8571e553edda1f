"""A random bit of a file flipped: found, or no number is another."""

import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import torch
from fakes import fair_esm_model, save_fair_esm

from esm_fast import weights
from esm_fast.cli import main
from esm_fast.dataset import compute, layout, planner, verify, worker  # noqa: F401, or each fork would import them

from .outcome import REFUSED, RIGHT, WRONG, of, of_command


def _numbers(path: Path) -> dict[str, torch.Tensor]:
    model = weights.build(weights.read(path))
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def _flip(path: Path, rng: Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def model_file(count: int, rng: Random, folder: Path, *, own: bool) -> Counter:
    good = save_fair_esm(fair_esm_model(0), folder / "good.pt")
    if own:
        good = folder / "good.safetensors"
        weights.save(weights.build(weights.read(folder / "good.pt")), good)
    right, outcomes = _numbers(good), Counter()

    def same(bad: Path) -> str:
        found = _numbers(bad)
        equal = all(torch.equal(found[key], tensor) for key, tensor in right.items())
        return "the same numbers" if equal and found.keys() == right.keys() else WRONG

    for number in range(count):
        bad = folder / f"bad{number}{good.suffix}"
        shutil.copy(good, bad)
        if not own:
            shutil.copy(folder / "good-contact-regression.pt", folder / f"bad{number}-contact-regression.pt")
        _flip(bad, rng)
        outcomes[of(partial(same, bad))] += 1
        bad.unlink()
    return outcomes


def data_set(count: int, rng: Random, folder: Path) -> Counter:
    """`verify` must find each."""
    (folder / "in.fa").write_text("".join(f">p{i}\n{'MKTVRQERLK' * (i + 1)}\n" for i in range(9)))
    out, outcomes = folder / "set", Counter()
    of_command(["embed", str(folder / "in.fa"), "-o", str(out), "--unit-residues", "150", "--residues"])
    layout.pa.array([b""])  # imports pandas, which each fork would
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.stat().st_size]
    for _ in range(count):
        path = rng.choice(files)
        data = path.read_bytes()
        _flip(path, rng)
        found = of(lambda: REFUSED if main(["verify", str(out)]) == 1 else WRONG)
        outcomes["named by verify" if found == REFUSED else found] += 1
        path.write_bytes(data)
    intact = of(lambda: RIGHT if main(["verify", str(out)]) == 0 else WRONG)
    return outcomes if intact == RIGHT else outcomes + Counter({WRONG: 1})


ATTACKS = {
    "bits of a fair-esm `.pt` flipped": (300, partial(model_file, own=False)),
    "bits of a file of `esm-fast convert` flipped": (300, partial(model_file, own=True)),
    "bits of a data set flipped": (300, data_set),
}
