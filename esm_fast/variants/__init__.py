"""Variant effects: every published way to score a variant, for proteins of any length (docs/variants.md)."""

import importlib

__all__ = ["log_probs", "pseudo_perplexity", "scan", "score"]


def __getattr__(name: str):
    """Imported when first asked for: torch takes seconds, which `esm-fast --help` does not wait for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".api", __name__), name)
