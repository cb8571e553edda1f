"""What the commands share that make, check and use data sets."""

import argparse
from pathlib import Path

from .common import InputError
from .numbers import positive

_FILES = (".h5", ".hdf5")
SOME_FAILED = 3  # exit code


def is_dataset(output: str) -> bool:
    return Path(output).is_dir() or output.endswith("/") or Path(output).suffix.lower() not in _FILES


def add_dataset(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data sets", "With -o OUT/ only.")
    group.add_argument("--residues", action="store_true", help="keep every residue's embedding as well")
    group.add_argument(
        "--shard",
        metavar="I/N",
        help="compute the I-th of N shares, from 0 (default: what SLURM or torchrun say); esm-fast finish ends it",
    )
    group.add_argument(
        "--unit-residues",
        type=positive,
        metavar="N",
        help="residues in a unit (default: 262144, with --residues 65536)",
    )
    group.add_argument("--log-json", metavar="FILE", help="add a JSON line for each unit; - is standard error")


def refuse_dataset_flags(args: argparse.Namespace) -> None:
    for name in ("residues", "shard", "unit_residues", "log_json"):
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} is for data sets; give a folder, -o NAME/")


def require_pyarrow() -> None:
    try:
        from ..dataset import layout  # noqa: F401
    except ImportError as error:
        raise InputError(str(error)) from None
