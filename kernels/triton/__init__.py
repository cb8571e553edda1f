"""The Triton backend for NVIDIA GPUs from sm_80 on, forward and backward; one file an op.

Work in progress, and run by name only: nothing here has run on a GPU. The kernels were executed in Triton's interpreter
and in part compiled and audited for sm_80 to sm_120; `make proof` does both and is not complete yet.
"""

from . import (
    attention_varlen,
    contact_map,
    contact_map_backward,
    embedding,
    gather,
    gelu_ffn,
    layer_norm,
    linear,
    masked_lm_head,
    masked_softmax,
    pool,
    pre_ln_attention,
    rotary,
)

MODULES = (
    attention_varlen,
    contact_map,
    contact_map_backward,
    embedding,
    gather,
    gelu_ffn,
    layer_norm,
    linear,
    masked_lm_head,
    masked_softmax,
    pool,
    pre_ln_attention,
    rotary,
)


def compile_specs(capability: int) -> list:
    """Every compilation of every kernel that ships for one architecture; see `common.Spec`."""
    return [spec for module in MODULES for spec in module.compile_specs(capability)]
