"""`transformer_stack` on the CPU: all layers in one call."""

import itertools
from operator import attrgetter

import torch

from esm_fast import _C
from esm_fast.ops.registry import implements
from esm_fast.ops.transformer_stack import POOLS

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
    if pools:
        return _pooled(x, cu_seqlens, max_seqlen, layers, heads, return_layers, rotary, pools)
    follow_torch()
    require_one_dtype(*[weight for layer in layers for weight in _matrices(layer)])
    stream = stream_of(x)
    result = torch.empty_like(stream)
    copies = {number: torch.empty_like(stream) for number in return_layers}
    matrices = iter(prepacked(*[weight for layer in layers for weight in _matrices(layer)]))
    calls = [
        (
            vectors_of(layer.q_weight, *_vectors(layer)),
            list(itertools.islice(matrices, _MATRICES)),
            (layer.attn_eps, layer.ffn_eps),
            copies.get(number),
        )
        for number, layer in enumerate(layers, start=1)
    ]
    tables = None if rotary is None else stream_of(rotary)
    ends = cu_seqlens.contiguous()
    _C.transformer_stack(x=stream, cu_seqlens=ends, heads=heads, rotary=tables, layers=calls, result=result)
    return tuple(wanted.to(x.dtype) for wanted in (result, *(copies[number] for number in return_layers)))


def _pooled(x, cu_seqlens, max_seqlen, layers, heads, return_layers, rotary, pools):
    """From each layer that is pooled to the next."""
    done, streams, pooled = 0, {}, [None] * len(pools)
    for stop in sorted({*(pool.layer for pool in pools), len(layers)}):
        between = [number for number in return_layers if done < number <= stop]
        part = layers[done:stop]
        numbers = [number - done for number in between]
        x, *copies = transformer_stack(x, cu_seqlens, max_seqlen, part, heads, numbers, rotary, ())
        streams |= dict(zip(between, copies, strict=True))
        for place, (layer, name, rows) in enumerate(pools):
            if layer == stop:
                pooled[place] = POOLS[name](x, cu_seqlens, rows)
        done = stop
    return x, *(streams[number] for number in return_layers), *pooled
