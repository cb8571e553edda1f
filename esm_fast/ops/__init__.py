"""The ops, one contract a file. Calling an op selects a kernel; see `registry`."""

from . import graph
from .attention_varlen import attention_varlen
from .contact_map import contact_map
from .embedding import embedding
from .gelu_ffn import gelu_ffn
from .masked_lm_head import masked_lm_head
from .masked_softmax import masked_softmax
from .pack_rows import pack_rows, unpack_rows
from .pool import pool
from .pool_max import pool_max
from .pool_moments import pool_moments
from .pre_ln_attention import pre_ln_attention
from .registry import OPS, BackendError, explain, select
from .transformer_stack import POOLS, LayerWeights, StackPool, stack_call, transformer_stack

for _op in OPS.values():
    if _op.shapes is not None:
        graph.define(_op)

__all__ = [
    "OPS",
    "POOLS",
    "BackendError",
    "LayerWeights",
    "StackPool",
    "attention_varlen",
    "contact_map",
    "embedding",
    "explain",
    "gelu_ffn",
    "masked_lm_head",
    "masked_softmax",
    "pack_rows",
    "pool",
    "pool_max",
    "pool_moments",
    "pre_ln_attention",
    "select",
    "stack_call",
    "transformer_stack",
    "unpack_rows",
]
