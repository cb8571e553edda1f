"""Makes Triton's interpreter faster, and changes no result: it describes every tensor anew, shape, size and type, which
takes longer than its arithmetic. Here equal descriptions are one object, so that what two operands have in common is
seen at a glance. What the interpreter computes and then looks at in debug mode alone, which is off, is not computed."""

import inspect
from functools import partial

import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_describe_block, _describe_tensor = tl.block_type.__init__, tl.tensor.__init__
_equal, _broadcast = tl.dtype.__eq__, TritonSemantic.broadcast_impl_value
_type_check, _constant = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.scalar_constant
_unwrap = core._unwrap_if_constexpr
_integers = frozenset(tl.dtype.SINT_TYPES + tl.dtype.UINT_TYPES)
_block_types: dict[tuple, tl.block_type] = {}
_broadcast_types: dict[tuple, tuple] = {}
_constants: dict[tuple, tl.tensor] = {}


def install() -> None:
    """Replaces Triton's methods for this process."""
    tl.block_type.__new__, tl.block_type.__init__ = _block_type, lambda *_: None
    tl.block_type.with_element_ty = _of_another_element
    tl.tensor.__init__ = _tensor
    tl.dtype.__eq__ = lambda self, other: self is other or _equal(self, other)
    tl.dtype.is_int = lambda self: self.name in _integers
    TritonSemantic.broadcast_impl_value = _broadcast_once
    TritonSemantic.binary_op_type_checking_impl = _checked_unless_equal
    TritonSemantic.scalar_constant = _constant_once
    if not interpreter.interpreter_builder.options.debug:
        TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
    core._unwrap_if_constexpr = lambda value: value if type(value) is tl.tensor else _unwrap(value)
    interpreter._patch_attr = _call_directly


def _block_type(cls, element_ty, shape):
    key = (element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape))
    if key not in _block_types:
        fresh = object.__new__(cls)
        _describe_block(fresh, element_ty, shape)
        _block_types[key] = fresh
    return _block_types[key]


def _of_another_element(self, element_ty):
    known = self.__dict__.setdefault("of_elements", {})
    if element_ty.name not in known:
        known[element_ty.name] = tl.block_type(element_ty, self.shape)
    return known[element_ty.name]


def _tensor(self, handle, type):
    if not hasattr(type, "described"):
        _describe_tensor(self, handle, type)
        type.described = self.shape, self.numel, self.dtype
    self.handle, self.type = handle, type
    self.shape, self.numel, self.dtype = type.described


def _broadcast_once(self, left, right):
    """To which types two types are broadcast is asked of Triton once."""
    types = left.type, right.type
    if types[0] is types[1]:
        return left, right
    blocks = [isinstance(type, tl.block_type) for type in types]
    if all(blocks):
        key = id(types[0]), id(types[1])  # which live on in _block_types
        if key not in _broadcast_types:
            _broadcast_types[key] = tuple(operand.type for operand in _broadcast(self, left, right))
        return tuple(map(partial(_broadcast_to, self), (left, right), _broadcast_types[key]))
    if any(blocks):
        whole = types[blocks.index(True)]
        return tuple(x if block else _splat_to(self, x, whole) for x, block in zip((left, right), blocks, strict=True))
    return left, right


def _broadcast_to(self, operand, type):
    if operand.type is type:
        return operand
    return self.tensor(self.builder.create_broadcast(operand.handle, [*type.shape]), type)


def _splat_to(self, scalar, block_type):
    type = block_type.with_element_ty(scalar.type)
    return self.tensor(self.builder.create_splat(type, scalar.handle), type)


def _checked_unless_equal(self, left, right, *pointers, **rules):
    """Numbers of one type need no conversion; divisions and pointers have rules of their own."""
    plain = type(left) is type(right) is tl.tensor and len(pointers) < 3 and not rules
    if plain and left.dtype is right.dtype and not left.dtype.is_ptr():
        return _broadcast_once(self, left, right)
    return _type_check(self, left, right, *pointers, **rules)


def _constant_once(self, value, dtype):
    if type(value) is not int:  # of floats, 0.0 and -0.0 are equal
        return _constant(self, value, dtype)
    key = value, dtype.name
    if key not in _constants:
        _constants[key] = _constant(self, value, dtype)
    return _constants[key]


def _call_directly(obj, name, member, builder, scope):
    """The function itself, without the layers that ask whether it was told of the interpreter."""
    inner = inspect.unwrap(member)

    def call(*arguments, **options):
        options["_semantic"] = interpreter.interpreter_semantic
        return inner(*arguments, **options)

    scope.set_attr(obj, name, call)
