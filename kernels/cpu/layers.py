"""The two halves of a transformer layer, `gelu_ffn` and `pre_ln_attention`, and all layers: `transformer_stack`."""

import torch

from esm_fast import _C
from esm_fast.ops.registry import implements
from esm_fast.ops.transformer_stack import POOLS, LayerWeights

from .common import BACKEND, follow_torch, packed, require_one_dtype, stream_of, unproven, vectors_of, why_not, yields
from .projections import attention_with_gradients
from .training import ffn_backward, ffn_train


@implements("gelu_ffn", backend=BACKEND, why_not=why_not, yields=unproven, train=ffn_train, backward=ffn_backward)
def gelu_ffn(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
    """See `esm_fast.ops.gelu_ffn`."""
    follow_torch()
    require_one_dtype(fc1_weight, fc2_weight)
    stream = stream_of(x)
    result = torch.empty_like(stream)
    gain, bias, bias1, bias2 = vectors_of(fc1_weight, ln_weight, ln_bias, fc1_bias, fc2_bias)
    _C.gelu_ffn(
        stream.data_ptr(),
        result.data_ptr(),
        len(stream),
        eps,
        gain.data_ptr(),
        bias.data_ptr(),
        packed(fc1_weight),
        bias1.data_ptr(),
        packed(fc2_weight),
        bias2.data_ptr(),
    )
    return result.to(x.dtype)


@implements(
    "pre_ln_attention", backend=BACKEND, why_not=why_not, yields=unproven, differentiable=attention_with_gradients
)
def pre_ln_attention(
    x,
    cu_seqlens,
    max_seqlen,
    ln_weight,
    ln_bias,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    v_weight,
    v_bias,
    out_weight,
    out_bias,
    heads,
    eps,
    rotary,
    return_qk,
):
    """See `esm_fast.ops.pre_ln_attention`."""
    follow_torch()
    require_one_dtype(q_weight, k_weight, v_weight, out_weight)
    stream, ends = stream_of(x), cu_seqlens.contiguous()
    result = torch.empty_like(stream)
    vectors = vectors_of(q_weight, ln_weight, ln_bias, q_bias, k_bias, v_bias, out_bias)
    gain, bias, q_bias, k_bias, v_bias, out_bias = (vector.data_ptr() for vector in vectors)
    tables = None if rotary is None else rotary.detach().float().contiguous()
    shape = len(x), heads, x.shape[1] // heads
    q, k = (torch.empty(shape, dtype=q_weight.dtype) for _ in range(2)) if return_qk else (None, None)
    _C.pre_ln_attention(
        stream.data_ptr(),
        result.data_ptr(),
        len(stream),
        ends.data_ptr(),
        len(ends) - 1,
        heads,
        eps,
        gain,
        bias,
        packed(q_weight),
        q_bias,
        packed(k_weight),
        k_bias,
        packed(v_weight),
        v_bias,
        packed(out_weight),
        out_bias,
        0 if tables is None else tables.data_ptr(),
        0 if q is None else q.data_ptr(),
        0 if k is None else k.data_ptr(),
    )
    result = result.to(x.dtype)
    return (result, q, k) if return_qk else result


def _matrices(layer: LayerWeights) -> list[torch.Tensor]:
    return [tensor for tensor in layer.attention + layer.ffn if tensor.ndim == 2]


@implements("transformer_stack", backend=BACKEND, why_not=why_not, yields=yields)
def transformer_stack(x, cu_seqlens, max_seqlen, layers, heads, return_layers, rotary, pools):
    """See `esm_fast.ops.transformer_stack`."""
    if pools:
        return _pooled(x, cu_seqlens, max_seqlen, layers, heads, return_layers, rotary, pools)
    follow_torch()
    require_one_dtype(*[weight for layer in layers for weight in _matrices(layer)])
    stream, ends = stream_of(x), cu_seqlens.contiguous()
    result = torch.empty_like(stream)
    copies = {number: torch.empty_like(stream) for number in return_layers}
    vectors = [
        vectors_of(layer.q_weight, *[t for t in layer.attention + layer.ffn if t.ndim == 1]) for layer in layers
    ]  # alive until the call returns
    calls = [
        (
            [vector.data_ptr() for vector in layer_vectors],
            [packed(weight) for weight in _matrices(layer)],
            (layer.attn_eps, layer.ffn_eps),
            copies[number].data_ptr() if number in copies else 0,
        )
        for number, (layer, layer_vectors) in enumerate(zip(layers, vectors, strict=True), start=1)
    ]
    tables = None if rotary is None else stream_of(rotary)
    _C.transformer_stack(
        stream.data_ptr(),
        result.data_ptr(),
        len(stream),
        ends.data_ptr(),
        len(ends) - 1,
        heads,
        0 if tables is None else tables.data_ptr(),
        calls,
    )
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
