"""What people see of a run: bars, and numbers in words."""

import shutil
import sys
from pathlib import Path


def progress(total: int | None, unit: str = "residues", done: int = 0, **more):
    """A bar on standard error, from `done` on. In a log file, where each of its states is a line, it moves rarely.

    more: of tqdm's options.
    """
    from tqdm import tqdm

    interval = 0.2 if sys.stderr is not None and sys.stderr.isatty() else 10
    options = {"unit": f" {unit}", "unit_scale": True, "mininterval": interval, "maxinterval": 2 * interval}
    options |= {"disable": sys.stderr is None, "file": getattr(sys.stderr, "bars", None)}
    return tqdm(total=total, initial=done, **options | more)


class Stages:
    """A bar for each stage of a work, one after the other; those of less than a second show none."""

    def __init__(self, **more):
        self._more, self._bar = more, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def begin(self, stage: str, total: int | None, unit: str = "residues") -> None:
        self.__exit__()
        self._bar = progress(total, unit, desc=stage, delay=1, **self._more)

    def update(self, count: int = 1) -> None:
        self._bar.update(count)

    def say(self, line: str) -> None:
        """On standard error, above the bar."""
        if sys.stderr is not None:
            self._bar.write(line, file=sys.stderr)
            sys.stderr.flush()


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


class SpaceError(ValueError):
    """The disk is too small for what is going to be written."""


def check_space(folder: Path, needed: int) -> None:
    """Raises SpaceError when the disk cannot hold about `needed` bytes more."""
    folder = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SpaceError(
            f"the output will take about {human_bytes(needed)}, and {folder} has {human_bytes(free)} free; choose "
            "another disk, or ask for less"
        )
