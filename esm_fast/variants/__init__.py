"""Variant effects: every published way to score a variant, for proteins of any length (docs/variants.md)."""

from .api import log_probs, pseudo_perplexity, scan, score

__all__ = ["log_probs", "pseudo_perplexity", "scan", "score"]
