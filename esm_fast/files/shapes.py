"""What a JSON file must hold, checked as a whole before any of it is used: a checksum tells damage, not a liar."""

from typing import NamedTuple

LARGEST = 2**48  # of a count of bytes, records or residues


class Names(NamedTuple):
    """An object of whatever names, whose values are alike."""

    values: object


class Maybe(NamedTuple):
    """What may be missing from an object."""

    shape: object


class ShapeError(ValueError):
    """JSON of another shape; the message names the place in it."""


def count(value: object) -> str | None:
    return None if type(value) is int and 0 <= value <= LARGEST else f"expected a count up to {LARGEST:,}"


def positive(value: object) -> str | None:
    return None if type(value) is int and 0 < value <= LARGEST else f"expected a positive count up to {LARGEST:,}"


def digest(value: object) -> str | None:
    known = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return None if known else "expected a SHA-256"


def require(value: object, shape: object, where: str) -> None:
    """Raises ShapeError for a value that is not of a shape.

    A shape is a type; a function that returns what is wrong, or None; [shape], a list of such; Names(shape); or
    {name: shape}, an object with at least these names, of which those that are Maybe may be missing.
    """
    if isinstance(shape, type):
        _require(type(value) is shape, value, f"expected {shape.__name__}", where)
    elif isinstance(shape, list):
        _require(isinstance(value, list), value, "expected a list", where)
        for number, item in enumerate(value):
            require(item, shape[0], f"{where}[{number}]")
    elif isinstance(shape, Names):
        _require(isinstance(value, dict), value, "expected an object of names", where)
        for name, item in value.items():
            require(item, shape.values, f"{where}, {name[:60]!r}")
    elif isinstance(shape, dict):
        _require(isinstance(value, dict), value, "expected an object of names", where)
        for name, inner in shape.items():
            if name in value:
                require(value[name], inner.shape if isinstance(inner, Maybe) else inner, f"{where}, {name!r}")
            elif not isinstance(inner, Maybe):
                raise ShapeError(f"{where}, {name!r} is missing")
    else:
        problem = shape(value)
        _require(problem is None, value, problem, where)


def _require(holds: bool, value: object, expected: str | None, where: str) -> None:
    if not holds:
        shown = repr(value)
        raise ShapeError(f"{where} is {shown if len(shown) <= 60 else shown[:60] + '...'}, {expected}")
