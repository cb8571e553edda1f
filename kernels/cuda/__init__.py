"""The CUDA backend for NVIDIA GPUs from sm_70 (V100) on; one file an op, the kernels in csrc/cuda/.

See docs/kernels/cuda.md.
"""

from . import (
    attention_varlen,
    contact_map,
    embedding,
    gelu_ffn,
    masked_lm_head,
    masked_softmax,
    pack_rows,
    pool,
    pre_ln_attention,
)

MODULES = (
    attention_varlen,
    contact_map,
    embedding,
    gelu_ffn,
    masked_lm_head,
    masked_softmax,
    pack_rows,
    pool,
    pre_ln_attention,
)
