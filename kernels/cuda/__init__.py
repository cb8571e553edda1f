"""The CUDA backend for NVIDIA GPUs from sm_70 (V100) on; one file an op, the kernels in csrc/cuda/.

See docs/cuda.md.
"""

from . import embedding, gelu_ffn, masked_lm_head, masked_softmax, pool

MODULES = (embedding, gelu_ffn, masked_lm_head, masked_softmax, pool)
