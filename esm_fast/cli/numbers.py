"""Numbers on the command line: read once, within the bounds of what they count, before anything is loaded."""

import argparse
import math
import re
from collections.abc import Callable

LARGEST = 2**31 - 1  # of what is counted in one batch, one file or one job
MOST_THREADS = 1024  # a machine that is asked for more than it can start cannot start anything else either


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """A reader of whole numbers from low to high."""

    def read(text: str) -> int:
        number = int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,30}\s*", text) else None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {low} to {high}")
        return number

    return read


def real(low: float, high: float = 1e30, *, open_below: bool = False) -> Callable[[str], float]:
    """A reader of finite numbers from low (open_below: above it) to high."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high or (open_below and number == low):  # what is compared with nan is false
            begin = f"above {low:g}" if open_below else f"from {low:g}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number {begin} to {high:g}")
        return number

    return read


positive = whole(1)
above_0, share = real(0, open_below=True), real(0, 1)
layer_number = whole(-10_000, 10_000)  # of a model; which of them it has is said when it is known
