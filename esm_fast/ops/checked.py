"""Arguments that were once found right, and are compared in bulk with what they were."""

import functools
import operator

import torch


class Checked(tuple):
    """Records, such as a model's layers, whose tensors were once found right: whether they still are, in bulk.

    Only what a check read is kept, and all of it is read again, so that no edit passes unseen; it saves the comparison
    with what is asked of each. tensors: those of all records, in order. even: whether they are contiguous, of one type,
    and begin where a kernel can load 16 bytes. state: another object whenever anything but values was found changed.
    """

    tensors: list[torch.Tensor]
    even = False
    state: object = None
    _found: tuple[dict, tuple] | None = None

    @classmethod
    def of(cls, records, tensors: list[torch.Tensor]) -> "Checked":
        made = cls(records)
        made.tensors = tensors
        return made

    def _facts(self) -> tuple:
        """All that a check and `opaque` read of tensors of plain classes. A tensor at the same address is on the same
        device, and is strided, or it would have no address."""
        tensors, kind = self.tensors, torch.Tensor
        return (
            [tensor.dtype for tensor in tensors],
            [tensor.shape for tensor in tensors],
            list(map(torch._C._data_address, tensors)),  # their storages', which asks for no copy of shared memory
            list(map(kind.storage_offset, tensors)),
            all(map(kind.is_contiguous, tensors)),
            any(map(kind.is_neg, tensors)),
        )

    def remember(self, sizes: dict) -> None:
        """They were found right for these sizes of symbols."""
        facts = dtypes, _, addresses, offsets, contiguous, negative = self._facts()
        if negative or not all(addresses):  # which `opaque` tells of
            return
        low = functools.reduce(operator.or_, addresses) | functools.reduce(operator.or_, offsets) * dtypes[0].itemsize
        self.even = contiguous and len(set(dtypes)) == 1 and not low % 16
        self._found, self.state = (sizes, facts), object()

    def still_right(self, sizes: dict) -> bool:
        return self._found is not None and self._found[0] == sizes and self._found[1] == self._facts()
