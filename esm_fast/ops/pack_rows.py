"""pack_rows and unpack_rows: between the rows of a padded batch and those of them that hold tokens.

Each is the other's transpose, and so the other's gradient.
"""

import torch

from .common import Maker
from .contract import Contract, Tensor, anything, count
from .registry import Case, Cost, op


def _rising(size: str):
    """Row numbers, strictly increasing, below a symbol's size."""

    def inside(rows, known):
        if not len(rows):
            return None
        first, last = rows[0].item(), rows[-1].item()
        if first >= 0 and last < known.sizes[size] and bool((rows[1:] > rows[:-1]).all()):
            return None
        return f"must rise strictly, from 0 or more to {known.sizes[size] - 1} or less"

    return Tensor("n", dtypes=frozenset({torch.int64}), inside=inside)


PACK = Contract(padded=anything("size", "width"), rows=_rising("size"))
UNPACK = Contract(packed=anything("n", "width"), rows=_rising("size"), size=count(makes="size"))


def _case(name, kept: list[int], size: int, width: int, *, packed: bool) -> Case:
    """kept: the rows. packed: whether it is a case of unpack_rows."""

    def build(dtype, device, seed):
        make, rows = Maker(dtype, device, seed), torch.tensor(kept, dtype=torch.int64, device=device)
        if packed:
            return dict(packed=make.normal(len(kept), width), rows=rows, size=size)
        return dict(padded=make.normal(size, width), rows=rows)

    return Case(name, build)


def _padded(lengths: list[int]) -> tuple[list[int], int]:
    """(rows, size) of sequences of these lengths in a padded batch."""
    longest = max(lengths)
    rows = [longest * i + j for i, length in enumerate(lengths) for j in range(length)]
    return rows, longest * len(lengths)


def _cases(packed: bool) -> list[Case]:
    batches = {
        "no_rows": ([], 3, 5),
        "one_row": ([2], 5, 8),
        "every_row": (list(range(6)), 6, 33),
        "gaps": ([1, 2, 3, 9, 11, 30], 37, 61),
        "ragged": (*_padded([7, 0, 19, 2]), 40),
        "wide": (*_padded([5, 2]), 1280),
    }
    return [_case(name, *batch, packed=packed) for name, batch in batches.items()]


def _bench_cases(packed: bool) -> list[Case]:
    return [_case("4x512", *_padded([512, 400, 300, 200]), 1280, packed=packed)]


def _cost(rows_moved: int, width: int, element_size: int, rows) -> Cost:
    return Cost(0, rows_moved * width * element_size + 8 * len(rows))


def cost_of_pack(padded, rows) -> Cost:
    return _cost(2 * len(rows), padded.shape[1], padded.element_size(), rows)


def cost_of_unpack(packed, rows, size) -> Cost:
    return _cost(len(rows) + size, packed.shape[1], packed.element_size(), rows)


@op(
    contract=PACK,
    cases=lambda: _cases(packed=False),
    bench_cases=lambda: _bench_cases(packed=False),
    cost=cost_of_pack,
    dtype_of="padded",
)
def pack_rows(padded, rows):
    """The chosen rows, end to end.

    Args:
        padded: (size, width), a padded batch with its first two axes flattened.
        rows: (n,) int64, strictly increasing, each in [0, size), as `batching.pack_padded` returns them.

    Returns:
        (n, width), of padded's dtype, bit for bit.
    """
    return padded.index_select(0, rows)


@op(
    contract=UNPACK,
    cases=lambda: _cases(packed=True),
    bench_cases=lambda: _bench_cases(packed=True),
    cost=cost_of_unpack,
    dtype_of="packed",
)
def unpack_rows(packed, rows, size: int):
    """Undoes `pack_rows`, with zeros in the rows that were not chosen.

    Args:
        packed: (n, width).
        rows: (n,) int64, strictly increasing, each in [0, size).
        size: rows of the result.

    Returns:
        (size, width), of packed's dtype, bit for bit.
    """
    return packed.new_zeros(size, packed.shape[1]).index_copy(0, rows, packed)
