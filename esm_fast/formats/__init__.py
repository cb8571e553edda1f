"""Formats of weights as the CPU kernels read them: prepacked in panels, without the row-major original.

One file a format, found by its name (`int8.py`), and one in csrc/cpu/formats; float32 and bfloat16 share `plain.py`.
What they share: `weight.py`, the tensor that stands in a matrix's place; `format.py`, what a format says of itself;
`model.py`, which prepacks a model; `original.py`, the matrices that it reads; `smoothing.py`, what is done to a layer
before it gets 8 bits; `file.py`, which saves prepacked weights and maps them.
"""

import functools
import importlib
import pkgutil

_SHARED = ("file", "format", "model", "original", "smoothing", "weight")


def files() -> list[str]:
    """The names of the files that hold a format, without importing them."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED]


def quantised() -> tuple[str, ...]:
    """The names of the formats that are no type of torch's: each has a file of its own. Imports nothing."""
    return tuple(name for name in files() if name != "plain")


@functools.cache
def formats() -> dict:
    """Every format by its name: a `format.Format` each."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in files()]
    return {form.name: form for module in modules for form in module.FORMATS}


def of_dtype(dtype):
    """The `format.Format` that `load` and checkpoints call by this torch.dtype; None if there is none."""
    return next((form for form in formats().values() if form.dtype == dtype), None)
