"""Variant effects: every published way to score a variant, for proteins of any length (docs/variants.md)."""

import importlib

_FROM = dict.fromkeys(("log_probs", "pseudo_perplexity", "scan", "score"), ".api")
_FROM |= dict.fromkeys(("Atlas", "build_atlas", "lookup"), ".atlas")
__all__ = sorted(_FROM)


def __getattr__(name: str):
    """Imported when first asked for: torch takes seconds, which `esm-fast --help` does not wait for."""
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FROM[name], __name__), name)
