"""Contacts for any model: a regression on its attention maps, fitted to structures (Rao et al. 2020)."""

from .fit import Regression, features, fit
from .precision import RANGES, precisions
from .structures import Structure, StructureError, read_structures

__all__ = ["RANGES", "Regression", "Structure", "StructureError", "features", "fit", "precisions", "read_structures"]
