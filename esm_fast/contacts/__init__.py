"""Contacts for any model: a regression on its attention maps, fitted to structures (Rao et al. 2020)."""

from .fit import Regression, features, fit
from .precision import RANGES, precisions
from .structures import NoProteinError, Structure, StructureError, files_of, read_structures

__all__ = [
    "RANGES",
    "NoProteinError",
    "Regression",
    "Structure",
    "StructureError",
    "features",
    "files_of",
    "fit",
    "precisions",
    "read_structures",
]
