"""The published ways to score a variant, one file each: found by their names, or by those others gave them.

Each file has NAME; ALIASES; WINDOW, what window="auto" means; LENGTHS and STOPS, whether variants of another length and
stops have a score; MASKED, whether a scan masks the residue it looks at; and

    add(sums, item, bound, proteins)

which adds a variant's terms to `sums`: `bound` is on proteins.wild_type, and proteins(text) is another protein.
"""

import importlib
import pkgutil
from functools import cache
from types import ModuleType


@cache
def strategies() -> dict[str, ModuleType]:
    """By name, without the aliases."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.NAME: module for module in modules}


def strategy(name: str) -> ModuleType:
    """Raises ValueError, naming those that there are."""
    for module in strategies().values():
        if name == module.NAME or name in module.ALIASES:
            return module
    raise ValueError(f"strategy is {name!r}; choose one of {', '.join(strategies())}")
