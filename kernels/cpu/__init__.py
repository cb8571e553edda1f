"""The CPU backend: fused C++ kernels in csrc/cpu, one set per instruction-set level, chosen at run time.

One file an op, forward and backward together, as in csrc/cpu/ops and csrc/cpu/bindings.

Fused: LN, GEMM, bias, GELU and residual of `gelu_ffn`; LN, projections, attention over the packed sequences and
residual of `pre_ln_attention`; all heads of `contact_map`, without ever storing a map. Statistics, softmax, sums and
the residual stream are fp32. A row's result has the same bits whatever the batch around it and the number of threads.
What won, what lost and by how much: docs/cpu.md.

Plain weights are prepacked once per tensor, beside the original: as much memory again (bf16 ESM-1b: 1.3 GB). With
`esm_fast.load(packed=True)` or a file of `esm-fast convert --pack` there is the prepacked copy only (esm_fast/formats).
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
