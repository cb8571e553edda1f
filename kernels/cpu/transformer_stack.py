"""`transformer_stack` on the CPU: all layers in one call."""

import itertools
from collections import defaultdict
from operator import attrgetter

import torch

from esm_fast import _C
from esm_fast.ops.registry import implements
from esm_fast.ops.transformer_stack import POOLS, StackPool

from .common import BACKEND, follow_torch, require_one_dtype, stream_of, vectors_of, why_not, yields
from .weights import prepacked

_matrices = attrgetter("q_weight", "k_weight", "v_weight", "out_weight", "fc1_weight", "fc2_weight")
_MATRICES = 6
_vectors = attrgetter(
    *("attn_ln_weight", "attn_ln_bias", "q_bias", "k_bias", "v_bias", "out_bias"),
    *("ffn_ln_weight", "ffn_ln_bias", "fc1_bias", "fc2_bias"),
)


@implements("transformer_stack", backend=BACKEND, why_not=why_not, yields=yields)
def transformer_stack(x, cu_seqlens, max_seqlen, layers, heads, return_layers, rotary, pools):
    """See `esm_fast.ops.transformer_stack`."""
    follow_torch()
    require_one_dtype(*[weight for layer in layers for weight in _matrices(layer)])
    stream = stream_of(x)
    result = torch.empty_like(stream)
    copies = {number: torch.empty_like(stream) for number in return_layers}
    pooled = [_pooling(stream, cu_seqlens, pool) for pool in pools]
    pooled_after = defaultdict(list)
    for pool, call in zip(pools, pooled, strict=True):
        pooled_after[pool.layer].append(call)
    matrices = iter(prepacked(*[weight for layer in layers for weight in _matrices(layer)]))
    calls = [
        (
            vectors_of(layer.q_weight, *_vectors(layer)),
            list(itertools.islice(matrices, _MATRICES)),
            (layer.attn_eps, layer.ffn_eps),
            copies.get(number),
            pooled_after[number],
        )
        for number, layer in enumerate(layers, start=1)
    ]
    tables = None if rotary is None else stream_of(rotary)
    ends = cu_seqlens.contiguous()
    _C.transformer_stack(x=stream, cu_seqlens=ends, heads=heads, rotary=tables, layers=calls, result=result)
    streams = (result, *(copies[number] for number in return_layers))
    return *(wanted.to(x.dtype) for wanted in streams), *(made for _, _, made in pooled)


def _pooling(stream: torch.Tensor, cu_seqlens: torch.Tensor, pool: StackPool) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The op, what it takes for each row as its kernel reads it, and the memory for what it makes."""
    rows = pool.rows.contiguous() if pool.rows.dtype == torch.bool else stream_of(pool.rows)
    return pool.op, rows, POOLS[pool.op].shapes(stream, cu_seqlens, rows)
