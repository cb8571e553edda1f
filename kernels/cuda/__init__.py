"""The CUDA backend for NVIDIA GPUs from sm_70 (V100) on; one file an op, the kernels in csrc/cuda/.

See docs/kernels/cuda.md.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
