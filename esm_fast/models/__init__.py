"""Model families, one file each."""

from .esm1 import CONFIGS, ESM1, Config, Outputs

__all__ = ["CONFIGS", "ESM1", "Config", "Outputs"]
