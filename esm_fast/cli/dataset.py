"""What the commands share that make, check and use data sets."""

import argparse
from pathlib import Path

from .common import MEANINGLESS, InputError, positive

_FILES = (".h5", ".hdf5")
# A unit is what a crash can lose, and what memory holds three of.
UNIT_RESIDUES, UNIT_RESIDUES_KEPT = 1 << 18, 1 << 16
SOME_FAILED, STOPPED = 3, 75


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
        help=f"residues in a shard (default: {UNIT_RESIDUES}, with --residues {UNIT_RESIDUES_KEPT})",
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


def plan_lines(plan) -> list[str]:
    info, fields = plan.info, plan.fields
    expected = info["requested"] - sum(info["skipped"].values())
    return [
        f"proteins  {expected:,} of {info['requested']:,} records, {info['sequences']:,} distinct sequences",
        f"skipped   {', '.join(f'{count:,} {what}' for what, count in info['skipped'].items())}",
        f"changed   {', '.join(f'{count:,} {what}' for what, count in info['changed'].items())}",
        f"model     {info['model']}" + (f"  ({MEANINGLESS.upper()})" if "warning" in info else ""),
        f"layers    {' '.join(map(str, fields['layers']))} ({fields['pool']}{', residues' * fields['residues']}, "
        f"stored as {fields['store']})",
    ]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
