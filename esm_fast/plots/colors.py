"""Colours of the points of a map, from the values of a column."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np

NO_VALUE = "#c8c8c8"
_PLAIN = "#3b6ea5"
_OTHER = "#7f7f7f"
# Told apart also by readers who do not see red and green as different: the palette of Okabe and Ito, without black.
_WORDS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
_LOW_TO_HIGH = ((68, 1, 84), (33, 145, 140), (253, 231, 37))


class Colors(NamedTuple):
    points: list[str]  # "#rrggbb" each
    legend: list[tuple[str, str]]  # what a colour means, and the colour


def colors_of(values: list[str] | None, count: int) -> Colors:
    """values: one a point, empty where there is none; None for points without a column.

    Numbers, where all are and there are more than words have colours, go from dark to light; else the most frequent
    words get a colour each and the others one together.
    """
    if values is None:
        return Colors([_PLAIN] * count, [])
    frequent = Counter(value for value in values if value)
    none = [("no value", NO_VALUE)] * ("" in values)
    if len(frequent) > len(_WORDS) and all(math.isfinite(_number(value)) for value in frequent):
        return _gradient(np.array([_number(value) for value in values]), none)
    shown = [value for value, _ in frequent.most_common(len(_WORDS))]
    color = dict(zip(shown, _WORDS, strict=False)) | {"": NO_VALUE}
    legend = [(f"{_short(value)} ({frequent[value]:,})", color[value]) for value in shown]
    if rest := frequent.total() - sum(frequent[value] for value in shown):
        legend.append((f"{len(frequent) - len(shown):,} others ({rest:,})", _OTHER))
    return Colors([color.get(value, _OTHER) for value in values], legend + none)


def _short(value: str) -> str:
    return value if len(value) <= 32 else value[:31] + "…"


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan


def _gradient(numbers: np.ndarray, none: list) -> Colors:
    low, high = float(np.nanmin(numbers)), float(np.nanmax(numbers))
    marks = [low, (low + high) / 2, high]

    def color(number: float) -> str:
        if math.isnan(number):
            return NO_VALUE
        channels = zip(*_LOW_TO_HIGH, strict=True)
        return "#" + "".join(f"{round(float(np.interp(number, marks, channel))):02x}" for channel in channels)

    return Colors([color(number) for number in numbers.tolist()], [(f"{mark:g}", color(mark)) for mark in marks] + none)
