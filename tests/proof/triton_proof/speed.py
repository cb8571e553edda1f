"""Makes Triton's interpreter faster, and changes no result: it describes every tensor anew, shape, size and type, which
takes longer than its arithmetic. Here equal descriptions are one object."""

import triton.language as tl
from triton.language.semantic import TritonSemantic

_describe_block, _describe_tensor = tl.block_type.__init__, tl.tensor.__init__
_equal, _broadcast = tl.dtype.__eq__, TritonSemantic.broadcast_impl_value
_block_types: dict[tuple, tl.block_type] = {}


def install() -> None:
    """Replaces Triton's methods for this process."""
    tl.block_type.__new__, tl.block_type.__init__ = _block_type, lambda *_: None
    tl.tensor.__init__ = _tensor
    tl.dtype.__eq__ = lambda self, other: self is other or _equal(self, other)
    TritonSemantic.broadcast_impl_value = _broadcast_unless_equal


def _block_type(cls, element_ty, shape):
    key = (element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape))
    if key not in _block_types:
        fresh = object.__new__(cls)
        _describe_block(fresh, element_ty, shape)
        _block_types[key] = fresh
    return _block_types[key]


def _tensor(self, handle, type):
    if not hasattr(type, "described"):
        _describe_tensor(self, handle, type)
        type.described = self.shape, self.numel, self.dtype
    self.handle, self.type = handle, type
    self.shape, self.numel, self.dtype = type.described


def _broadcast_unless_equal(self, left, right):
    return (left, right) if left.type is right.type else _broadcast(self, left, right)
