"""What an op's arguments must be, declared once for every backend: shapes in symbols, dtypes, devices and ranges.

    Contract(x=floats("n", "width"), cu_seqlens=offsets("n"), weight=floats("n"))

A symbol stands for the size it is met with first; whatever names it later must have that size. All tensors must be on
one device. Values, such as an index's, are looked at where that does not mean waiting for a device.

A kernel reads memory by address, so nothing is skipped for arguments that were right before: tensors can change in
place. A check takes half a microsecond to two an argument.
"""

import operator
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import nn

from .checked import Checked

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
INTEGERS = frozenset({torch.int32, torch.int64})
LARGEST = 2**31 - 1  # what the kernels count rows and heads with
_EXACT = 2**53  # whole numbers beyond it are no floating-point numbers
# Symbols of axes that may be empty. Nothing can be computed with no width, no head or no vocabulary.
MAY_BE_EMPTY = {"n", "m", "targets", "ends", "size", "batch", "length", "sequences"}
# The classes of tensors whose memory is what they say: kernels may read it. packed.py adds its own.
PLAIN: set[type] = {torch.Tensor, nn.Parameter}


class Known(NamedTuple):
    """What a check has learned: sizes by symbol, and the tensors it has seen."""

    sizes: dict[Any, int]
    tensors: list[torch.Tensor]


class Spec:
    """What one argument must be."""

    def problem(self, value, known: Known) -> str | None:
        """What is wrong with its kind and shape, to be read after the argument's name; None if nothing is."""
        raise NotImplementedError

    error: type[Exception] = ValueError  # for what is wrong with its values

    def problem_inside(self, value, known: Known) -> str | None:
        """What is wrong with its values, once the shapes of all arguments are right."""
        return None


class Tensor(Spec):
    """A strided tensor of these axes, each a symbol or a number."""

    def __init__(self, *axes, dtypes=FLOATS, optional=False, alike: str | None = None, expected="", inside=None):
        """dtypes: None for any. alike: tensors that have this word in common must have one dtype. expected: of the
        message, if the axes do not say it. inside(tensor, known): see `problem_inside`, on the CPU only."""
        self.axes, self.dtypes, self.optional, self.alike, self.inside = axes, dtypes, optional, alike, inside
        kind = {FLOATS: "floating point", INTEGERS: "int32 or int64", None: ""}.get(dtypes)
        kind = ", ".join(str(d).removeprefix("torch.") for d in dtypes) if kind is None else kind
        shape = ", ".join(map(str, axes)) + ("," if len(axes) == 1 else "")
        self.expected = expected or f"({shape}){kind and ', '}{kind}"

    def problem(self, value, known: Known) -> str | None:
        if type(value) not in PLAIN:
            if value is None and self.optional:
                return None
            if not isinstance(value, torch.Tensor):
                return f"must be a tensor {self.expected}, not {_kind(value)}"
        sizes, shape, axes = known.sizes, value.shape, self.axes
        if len(shape) != len(axes):
            return f"must be {self.expected}"
        for axis, size in zip(axes, shape):  # noqa: B905 - of one length, and strict takes time
            if sizes.setdefault(axis, size) != size or not size and axis not in MAY_BE_EMPTY:
                return self._other_shape(sizes)
        dtype = value.dtype
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"must be {self.expected}"
        if self.alike is not None and sizes.setdefault(self.alike, dtype) != dtype:
            return f"is not {sizes[self.alike]} as the others: the op takes {self.alike} of one dtype"
        device = value.device
        if sizes.setdefault("device", device) != device:
            return f"is on {device}: all tensors must be on one device, here {sizes['device']}"
        if value.layout is not torch.strided:
            return f"is {str(value.layout).removeprefix('torch.')}: only dense tensors can be computed with"
        known.tensors.append(value)
        return None

    def problem_inside(self, value, known: Known) -> str | None:
        if self.inside is None or value is None or not value.is_cpu:
            return None
        return self.inside(value, known)

    def _other_shape(self, sizes: dict) -> str:
        here = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.axes if axis in sizes)
        empty = [str(axis) for axis in self.axes if axis not in MAY_BE_EMPTY and not sizes.get(axis, 1)]
        if empty:
            return f"must be {self.expected}, and {' and '.join(empty)} at least 1"
        return f"must be {self.expected}, here {here}"


def floats(*axes, optional=False) -> Tensor:
    """Of any of the four floating-point types: a kernel converts vectors and rows to what it computes in."""
    return Tensor(*axes, optional=optional)


def weights(*axes, optional=False) -> Tensor:
    """A matrix of the op's compute dtype, which is that of all its matrices."""
    return Tensor(*axes, alike="weights", optional=optional)


class _Turns(Tensor):
    def problem(self, value, known: Known) -> str | None:
        if value is not None and known.sizes["head_dim"] % 2:
            return f"turns pairs: head_dim must be even, is {known.sizes['head_dim']}"
        return super().problem(value, known)


def turns(rows: str) -> Tensor:
    """Cosines and sines of rotary positions, or None. In fp32 whatever the weights are: bf16 cannot count past 256."""
    axes = (2, rows, "head_dim")
    return _Turns(*axes, dtypes=frozenset({torch.float32}), optional=True, expected=f"float32, (2, {rows}, head_dim)")


def alike(*axes) -> Tensor:
    """Floating-point tensors of one dtype, such as q, k and v."""
    return Tensor(*axes, alike="tensors")


def anything(*axes) -> Tensor:
    """Of any dtype: what is only moved."""
    return Tensor(*axes, dtypes=None)


def flags(*axes) -> Tensor:
    return Tensor(*axes, dtypes=frozenset({torch.bool}))


def offsets(rows: str) -> Tensor:
    """cu_seqlens: where each sequence begins, and behind the last one the number of rows. Kernels read it as int32."""

    def inside(value, known):
        ends = value.tolist()
        if ends[0] != 0 or ends[-1] != known.sizes[rows] or ends != sorted(ends):
            return f"must rise from 0 to the number of rows, {known.sizes[rows]}"
        known.sizes["longest"] = max(map(operator.sub, ends[1:], ends), default=0)
        return None

    return _Offsets("ends", dtypes=frozenset({torch.int32}), expected="int32, (sequences + 1,)", inside=inside)


class _Offsets(Tensor):
    def problem(self, value, known: Known) -> str | None:
        problem = super().problem(value, known)
        if problem is None:
            sequences = known.sizes["ends"] - 1
            if sequences < 0 or known.sizes.setdefault("sequences", sequences) != sequences:
                return f"must be {self.expected}"
        return problem


class Indices(Tensor):
    error = IndexError


def integers(*axes) -> Tensor:
    return Tensor(*axes, dtypes=INTEGERS)


def indices(*axes, below: str, ignored: int | None = None, optional=False) -> Tensor:
    """Whole numbers from 0 to a symbol's size, which is not among them; and `ignored`. Any, without such a size."""

    def inside(value, known):
        if not value.numel():
            return None
        low, high = (bound.item() for bound in value.aminmax())
        if (end := known.sizes.get(below)) is None:  # of a table that is not there
            return None
        if low >= 0 and high < end:
            return None
        if ignored is not None and not bool(((value < 0) & (value != ignored)).any()) and high < end:
            return None
        also = "" if ignored is None else f", or {ignored}"
        return f"must be from 0 to {end - 1}{also}, and holds {low} to {high}"

    return Indices(*axes, dtypes=INTEGERS, optional=optional, inside=inside)


class _Number(Spec):
    """A plain number: kind "whole" or "real", from least to most."""

    def __init__(self, kind: type, least, most, expected: str, makes: str | None = None):
        self.kind, self.least, self.most, self.expected, self.makes = kind, least, most, expected, makes

    def problem(self, value, known: Known) -> str | None:
        if not isinstance(value, self.kind) or isinstance(value, bool):
            return f"must be {self.expected}, not {_kind(value)}"
        if not self.least <= value <= self.most or self.kind is Real and value > _EXACT and isinstance(value, Integral):
            return f"must be {self.expected}, is {value}"
        if self.makes is not None:
            known.sizes[self.makes] = int(value)
        return None


def count(most: int = LARGEST, makes: str | None = None) -> Spec:
    """A whole number from 0. makes: the symbol it is the size of."""
    return _Number(Integral, 0, most, f"a whole number from 0 to {most}", makes)


def real() -> Spec:
    """What is added to a variance. Kernels are handed it in fp32."""
    return _Number(Real, 0.0, torch.finfo(torch.float32).max, "a finite number, 0 or more")


def factor() -> Spec:
    """What scores are multiplied by: kernels take a row's largest score before they do."""
    return _Number(Real, torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max, "a finite number above 0")


class _Flag(Spec):
    def problem(self, value, known: Known) -> str | None:
        return None if isinstance(value, bool) else f"must be True or False, not {_kind(value)}"


flag = _Flag


class heads_of(Spec):  # noqa: N801 - used as the functions above are
    """The number of heads that a width is divided into; makes known "heads" and "head_dim"."""

    def __init__(self, width: str):
        self.width = width

    def problem(self, value, known: Known) -> str | None:
        width = known.sizes[self.width]
        if not isinstance(value, Integral) or isinstance(value, bool):
            return f"must be a whole number, not {_kind(value)}"
        if value < 1 or width % value:
            return f"must be 1 or more, and {self.width} a multiple of it: {self.width} {width}, {value} heads"
        known.sizes["heads"], known.sizes["head_dim"] = int(value), width // int(value)
        return None


class longest(_Number):  # noqa: N801
    """max_seqlen: kernels on GPUs compute as many rows of each sequence, and no more."""

    def __init__(self):
        super().__init__(Integral, 0, LARGEST, f"a whole number from 0 to {LARGEST}")

    def problem_inside(self, value, known: Known) -> str | None:
        there = known.sizes.get("longest", 0)
        return None if value >= there else f"must be at least {there}, the longest sequence's length, is {value}"


class Records(Spec):
    """At least one named tuple of a kind, with a spec for each of its fields, tensors first: a model's layers.

    own: symbols that may differ from one to the next; each is the first axis of a field. A model has hundreds of
    tensors: that they are right is found out in bulk, and field by field only what is wrong.
    """

    def __init__(self, kind: type, *, noun: str, own: tuple[str, ...], **specs: Spec):
        self.kind, self.noun, self.own, self.specs = kind, noun, own, specs
        self._tensors = [name for name, spec in specs.items() if isinstance(spec, Tensor)]
        self._alike = [i for i, name in enumerate(self._tensors) if specs[name].alike]
        first = [specs[name].axes[0] for name in self._tensors]
        self._own_at = [first.index(symbol) for symbol in own]
        self._symbols = sorted({axis for name in self._tensors for axis in specs[name].axes} - set(own))
        assert list(specs) == list(kind._fields) and self._tensors == list(specs)[: len(self._tensors)]

    def problem(self, value, known: Known) -> str | None:
        if type(value) is Checked and not torch.is_grad_enabled():  # where tensors are asked for nothing more
            before = {name: known.sizes.get(name) for name in (*self._symbols, "device", "weights")}
            if value.still_right(before):
                known.sizes["weights"] = value.tensors[self._alike[0]].dtype
                return None
            if self._right(value, known):
                value.remember(before)
                return None
        if not isinstance(value, Sequence) or not value:
            return f"must hold at least one {self.noun}, as {self.kind.__name__}"
        for number, record in enumerate(value, start=1):
            if not isinstance(record, self.kind):
                return f"must be {self.kind.__name__} all, {self.noun} {number} is {_kind(record)}"
        if self._right(value, known):
            return None
        for number, record in enumerate(value, start=1):
            sizes = {symbol: size for symbol, size in known.sizes.items() if symbol not in self.own}
            for name, spec in self.specs.items():
                field = getattr(record, name)
                if (problem := spec.problem(field, Known(sizes, known.tensors))) is not None:
                    found = _shape(name, field)
                    return f"are wrong: {name} of {self.noun} {number} {problem}" + (found and f"; got {found}")
            known.sizes.update((symbol, size) for symbol, size in sizes.items() if symbol not in self.own)
        return None

    def _right(self, records: Sequence, known: Known) -> bool:
        """Whether all of them are right, found out in bulk."""
        count, sizes = len(self._tensors), known.sizes
        tensors = [tensor for record in records for tensor in record[:count]]
        if not set(map(type, tensors)) <= PLAIN:
            return False
        dtypes = [tensor.dtype for tensor in tensors]
        alike = {dtype for at in self._alike for dtype in dtypes[at::count]}
        uniform = len(alike) == 1 and sizes.get("weights") in (None, *alike) and set(dtypes) <= FLOATS
        devices, layouts = {tensor.device for tensor in tensors}, {tensor.layout for tensor in tensors}
        if not uniform or devices != {sizes["device"]} or layouts != {torch.strided}:
            return False
        if not self._shaped([tensor.shape for tensor in tensors], sizes):
            return False
        for name in self.specs.keys() - set(self._tensors):
            if any(self.specs[name].problem(value, known) for value in {getattr(record, name) for record in records}):
                return False
        sizes["weights"] = alike.pop()
        known.tensors.extend(tensors)
        return True

    def _shaped(self, shapes: list[torch.Size], sizes: dict) -> bool:
        count, expected = len(self._tensors), {}
        for start in range(0, len(shapes), count):
            own = tuple(shapes[start + at][0] if shapes[start + at] else 0 for at in self._own_at)
            if own not in expected:
                here = sizes | dict(zip(self.own, own, strict=True))
                expected[own] = [tuple(here[axis] for axis in self.specs[name].axes) for name in self._tensors]
            if not all(own) or shapes[start : start + count] != expected[own]:
                return False
        return True


class Contract:
    """Checks an op's arguments, by name, in the order of its signature."""

    def __init__(self, also: Callable[..., str | None] | None = None, /, **specs: Spec):
        """also(**arguments): what is wrong between arguments that are right each, or None."""
        self.specs, self.also = specs, also
        self._inside = [name for name, spec in specs.items() if _looks_inside(spec)]
        axes = {axis for spec in specs.values() if isinstance(spec, Tensor) for axis in spec.axes}
        self._numbers = {axis: axis for axis in axes if isinstance(axis, int)}

    def check(self, op_name: str, arguments: dict[str, Any]) -> list[torch.Tensor]:
        """All tensors among the arguments.

        Raises:
            ValueError: naming the op, the argument, what it must be, and the shapes of all. IndexError: for an index.
        """
        known = Known(dict(self._numbers), [])
        for name, spec in self.specs.items():
            if (problem := spec.problem(arguments[name], known)) is not None:
                raise ValueError(_message(op_name, name, problem, arguments))
        for name in self._inside:
            if (problem := self.specs[name].problem_inside(arguments[name], known)) is not None:
                raise self.specs[name].error(_message(op_name, name, problem, arguments))
        if self.also is not None and (problem := self.also(known, **arguments)) is not None:
            raise ValueError(f"{op_name}: {problem}")
        return known.tensors


def _looks_inside(spec: Spec) -> bool:
    if isinstance(spec, Tensor):
        return spec.inside is not None
    return type(spec).problem_inside is not Spec.problem_inside


def _message(op_name: str, name: str, problem: str, arguments: dict[str, Any]) -> str:
    shown = {name: arguments[name]} | arguments
    shapes = [text for other, value in shown.items() if (text := _shape(other, value))]
    return f"{op_name}: {name} {problem}" + (f"; got {', '.join(shapes)}" if shapes else "")


def _shape(name: str, value) -> str:
    if not isinstance(value, torch.Tensor):
        return ""
    where = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{where}"


def _kind(value) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}"
