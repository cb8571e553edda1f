"""pack_rows and unpack_rows: between the rows of a padded batch and those of them that hold tokens.

Each is the other's transpose, and so the other's gradient.
"""

import torch

from .common import Maker, require
from .registry import Case, Cost, op


def _check_rows(rows, op_name):
    require(rows.ndim == 1 and rows.dtype == torch.int64, op_name, "rows must be int64, (n,)", rows=rows)


def check_pack(padded, rows):
    require(padded.ndim == 2, "pack_rows", "padded must be (size, width)", padded=padded)
    _check_rows(rows, "pack_rows")


def check_unpack(packed, rows, size):
    shaped = packed.ndim == 2 and rows.shape == packed.shape[:1]
    require(shaped, "unpack_rows", "packed must be (n, width) and rows (n,)", packed=packed, rows=rows)
    _check_rows(rows, "unpack_rows")
    require(len(rows) <= size, "unpack_rows", f"{len(rows)} rows do not fit into size={size}", rows=rows)


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
    check=check_pack,
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
    check=check_unpack,
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
