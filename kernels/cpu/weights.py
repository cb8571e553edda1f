"""The weights that the CPU kernels read: prepacked in inference, plain in training."""

from collections.abc import Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary

from esm_fast import _C
from esm_fast.formats.weight import PrepackedWeight

# Of plain matrices: a checksum of the values that were prepacked, and what they became.
_prepacked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def prepacked(*weights: torch.Tensor) -> list[_C.Weights]:
    """The prepacked copies of weight matrices: of plain tensors made when first asked for, and when values changed.

    Every value is looked at in every call, so no edit is missed, also one past autograd's version counter (through
    `.data`, a NumPy view, another process). It costs one reading of the plain matrices: docs/cpu.md, "What it costs".
    """
    plain = [weight for weight in weights if not isinstance(weight, PrepackedWeight)]
    known = iter(_of_plain(plain)) if plain else iter(())
    return [weight.weights if isinstance(weight, PrepackedWeight) else next(known) for weight in weights]


def _of_plain(weights: Sequence[torch.Tensor]) -> list[_C.Weights]:
    rows = [weight if weight.is_contiguous() else weight.detach().contiguous() for weight in weights]
    found = []
    for weight, matrix, checksum in zip(weights, rows, _C.checksums(rows), strict=True):
        state = checksum, weight.shape, weight.dtype
        known = _prepacked.get(weight)
        if known is None or known[0] != state:
            known = _prepacked[weight] = (state, PrepackedWeight.pack(matrix).weights)
        found.append(known[1])
    return found


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
