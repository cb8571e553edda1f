"""What the model sees of a protein that is longer than its 1,022 residues: the rules that were published.

Tokens are numbered over the whole protein with <cls> and <eos>, so residue i (from 0) is token i + 1. A rule gives for
each residue the views that its log-probabilities come from, with weights that sum to 1; one view if the protein fits.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

RESIDUES = 1022  # of a window, where the model takes as many


class Span(NamedTuple):
    """Tokens [start, end) of the protein; wrapped: of residues, with a <cls> and an <eos> of their own around them."""

    start: int
    end: int
    wrapped: bool = False


class View(NamedTuple):
    span: Span
    row: int  # the residue's, in the tokens the model gets
    weight: float


Rule = Callable[[int], list[View]]  # of a residue's index


def rule(name: str, residues: int, longest: int | None) -> Rule:
    """The rule for a protein. longest: residues the model takes, or None for any number.

    Raises ValueError for a protein that "error" refuses, or "whole" on a model with a limit.
    """
    if name not in WINDOWS:
        raise ValueError(f"window is {name!r}; choose one of auto, {', '.join(WINDOWS)}")
    size = RESIDUES if longest is None else min(RESIDUES, longest)
    if residues <= size or name == "whole" and (longest is None or residues <= longest):
        return Whole(Span(0, residues + 2))
    return WINDOWS[name](residues, size)


class Whole(NamedTuple):
    """The rule of a protein that fits: all its residues in one span."""

    span: Span

    def __call__(self, at: int) -> list[View]:
        return [View(self.span, at + 1, 1.0)]


def error(residues: int, size: int) -> Rule:
    raise ValueError(
        f"the protein has {residues} residues and the limit is {size}; give another window than 'error': "
        "'optimal', 'brandes' or 'proteingym'"
    )


def whole(residues: int, size: int) -> Rule:
    """Only for models that take proteins of any length."""
    raise ValueError(f"the protein has {residues} residues, and this model takes {size}; window='whole' needs another")


def optimal(residues: int, size: int) -> Rule:
    """ProteinGym's, for masked positions: as many tokens as fit, centred on the residue, flush at both ends."""
    tokens, width = residues + 2, size + 2
    half = width // 2

    def views(at: int) -> list[View]:
        token = at + 1
        start = 0 if token < half else tokens - width if token >= tokens - half else token - half
        return [View(Span(start, start + width), token - start, 1.0)]

    return views


def brandes(residues: int, size: int) -> Rule:
    """Brandes et al. 2023 (esm-variants): windows of residues, each between a <cls> and an <eos> of its own.

    They are placed in pairs from both ends inwards, neighbours overlapping by at least half and one residue (512 of
    1,022); one more stands in the middle where the last two overlap by less. Log-probabilities are averaged with a
    sigmoid ramp (scale 20) over half an overlap at each end of a window, but not at the protein's own two ends.
    """
    overlap = size // 2 + 1
    starts = _pairs(residues, size, overlap)
    ramp = overlap // 2
    rising = 1 / (1 + np.exp(-(np.arange(ramp) - ramp / 2) / 20))
    falling = 1 / (1 + np.exp((np.arange(ramp) - ramp / 2) / 20))  # as it was coded: 1 - rising, not its mirror image
    inner = np.concatenate([rising, np.ones(size - 2 * ramp), falling])
    first, last = inner.copy(), inner.copy()
    first[:ramp], last[size - ramp :] = 1, 1
    weights = [first, *[inner] * (len(starts) - 2), last]
    spans = [Span(start + 1, start + 1 + size, wrapped=True) for start in starts]
    return _weighted(starts, weights, lambda k, within: (spans[k], within + 1), size)


def _pairs(residues: int, size: int, overlap: int) -> list[int]:
    """Where the windows begin, ascending."""
    step, low, high, starts = size - overlap, 0, residues, []
    while high - low > size:
        starts += [low, high - size]
        low, high = low + step, high - step
    if starts[-2] + size - 1 - starts[-1] < overlap:
        middle = low + (high - low) // 2
        starts.append(middle - size // 2)
    return sorted(starts)


def proteingym(residues: int, size: int) -> Rule:
    """ProteinGym's `overlapping`: windows cut from the protein's tokens, so that inner ones have no <cls> and no <eos>.

    From both ends inwards by half a window, and one in the middle where the last two overlap by less. Log-probabilities
    are averaged with a sigmoid ramp (scale 16) over a quarter of each end of a window, the protein's own ends included;
    the outermost token of a window, which is <cls> or <eos> only at the protein's ends, has the full weight.
    """
    tokens, width = residues + 2, size + 2
    starts = _steps(tokens, width, size // 2)
    weight, ramp = np.ones(width), size // 4 + 1  # 256 of 1,022
    weight[1 : ramp + 1] = 1 / (1 + np.exp(-(np.arange(1, ramp + 1) - ramp / 2) / 16))
    weight[size - ramp : size + 1] = 1 / (1 + np.exp((np.arange(-ramp, 1) + ramp / 2) / 16))
    spans = [Span(start, start + width) for start in starts]
    by_token = _weighted(starts, [weight] * len(starts), lambda k, within: (spans[k], within), width)
    return lambda at: by_token(at + 1)


def _steps(tokens: int, width: int, step: int) -> list[int]:
    """Where the windows begin, in the order they were placed."""
    left, right = 0, tokens - width
    starts = [left, right]
    while left + width - 1 <= right:
        left, right = left + step, right - step
        starts += [left, right]
    if left + width - right < step:
        starts.append(tokens // 2 - width // 2)
    return starts


def _weighted(starts: list[int], weights: list[np.ndarray], place: Callable, size: int) -> Rule:
    """place(window, index within it) -> (span, row)."""
    begin = np.array(starts)
    stacked = np.stack(weights)

    @lru_cache(maxsize=4096)
    def views(at: int) -> list[View]:
        covering = np.flatnonzero((begin <= at) & (at < begin + size))
        own = stacked[covering, at - begin[covering]]
        shares = own / own.sum()
        within = zip(covering.tolist(), (at - begin[covering]).tolist(), shares.tolist(), strict=True)
        return [View(*place(k, i), share) for k, i, share in within]

    return views


WINDOWS: dict[str, Callable[[int, int], Rule]] = {
    rule.__name__: rule for rule in (optimal, brandes, proteingym, error, whole)
}


def crop(wild_type: int, mutated: int, first: int, size: int) -> tuple[int, int, int]:
    """esm-variants' cut around an insertion or deletion, for the two proteins' log-likelihoods to be compared.

    wild_type, mutated: their lengths; first: index of the first residue that differs. Returns (start, end in the wild
    type, end in the mutated protein).
    """
    longer, half = wild_type - mutated, size // 2
    start = first - half
    reach = first + half - min(start, 0)
    ends = reach + min(longer, 0), reach - max(longer, 0)
    start = max(start, 0)
    end_wild_type, end_mutated = min(ends[0], wild_type), min(ends[1], mutated)
    if start > 0 and max(end_wild_type, end_mutated) - start < size:  # there is room on the left
        start = max(0, max(end_wild_type, end_mutated) - size)
    return start, end_wild_type, end_mutated
