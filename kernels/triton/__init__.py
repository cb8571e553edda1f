"""The Triton backend for NVIDIA GPUs from sm_80 on, forward and backward; one file an op.

Run by name only: compiled and audited for sm_80 to sm_120, executed in Triton's interpreter, not yet run on a GPU.
docs/kernels/triton.md says what that proves.
"""

import importlib
import pkgutil

_ALL = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
MODULES = [module for module in _ALL if hasattr(module, "compile_specs")]


def compile_specs(capability: int) -> list:
    """Every compilation of every kernel that ships for one architecture, each once; see `common.Spec`."""
    found = [spec for module in MODULES for spec in module.compile_specs(capability)]
    return [spec for place, spec in enumerate(found) if spec not in found[:place]]
