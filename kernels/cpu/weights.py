"""The weights that the CPU kernels read: prepacked in inference, plain in training."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from esm_fast import _C
from esm_fast.edits import Watch, watch
from esm_fast.formats.weight import PrepackedWeight
from esm_fast.memory import address


class _Prepacked(NamedTuple):
    """What a plain matrix became; `checksum` is that of the values that were prepacked."""

    weights: _C.Weights
    checksum: tuple
    watch: Watch | None

    def fits(self, matrix: torch.Tensor) -> bool:
        return self.watch is not None and self.watch.holds(matrix)


# Storage -> place in it -> what the matrix there became. Not by tensors, see `esm_fast.edits`.
_prepacked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _known(matrix: torch.Tensor) -> _Prepacked | None:
    return _prepacked.get(matrix.untyped_storage(), {}).get(_place(matrix))


def _place(matrix: torch.Tensor) -> tuple:
    return address(matrix), matrix.shape, matrix.stride(), matrix.dtype


def prepacked(*weights: torch.Tensor) -> list[_C.Weights]:
    """The prepacked copies of weight matrices: of plain tensors made when first asked for, and when values changed.

    No edit is missed: a matrix that somebody could have written since is read whole and compared by a checksum; see
    `esm_fast.edits`, and docs/cpu.md, "What it costs".
    """
    plain = [weight for weight in weights if not isinstance(weight, PrepackedWeight)]
    if plain:
        _renew([weight for weight in plain if (known := _known(weight)) is None or not known.fits(weight)])
    return [weight.weights if isinstance(weight, PrepackedWeight) else _known(weight).weights for weight in weights]


def _renew(weights: Sequence[torch.Tensor]) -> None:
    """Of plain matrices that may have changed."""
    if not weights:
        return
    rows = [weight if weight.is_contiguous() else weight.detach().contiguous() for weight in weights]
    for weight, matrix, checksum in zip(weights, rows, _C.checksums(rows), strict=True):
        known = _known(weight)
        same = known is not None and known.checksum == checksum
        packed = known.weights if same else PrepackedWeight.pack(matrix).weights
        _prepacked.get(weight.untyped_storage(), {}).pop(_place(weight), None)
        watched = watch(weight)  # which may bring it into other memory
        _prepacked.setdefault(weight.untyped_storage(), {})[_place(weight)] = _Prepacked(packed, checksum, watched)


def plain_matrix(weight: torch.Tensor) -> torch.Tensor:
    """As the training kernels read it: plain, because they pack it for each call."""
    if hasattr(weight, "linear"):
        raise RuntimeError("8-bit weights have no gradients; load the model with another dtype")
    return weight.unpack() if isinstance(weight, PrepackedWeight) else weight.detach().contiguous()


def filled_up(rows: int) -> int:
    """To a number of five binary digits: there are 16 from one power of two to the next, and none below 64."""
    unit = max(64, 1 << rows.bit_length() >> 5)
    return -(-rows // unit) * unit


def product_of_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a.T @ b, a matrix's gradient. In bf16 zeros fill the rows up, because oneDNN makes code for every number of them
    and keeps it."""
    missing = filled_up(len(a)) - len(a)
    if missing and a.dtype != torch.float32:
        a, b = (torch.nn.functional.pad(matrix, (0, 0, 0, missing)) for matrix in (a, b))
    return a.T @ b
