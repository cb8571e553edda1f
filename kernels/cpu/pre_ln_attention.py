"""`pre_ln_attention` on the CPU, a layer's first half; in training attention with its own backward, and what surrounds
it with its own, too."""

import torch

from esm_fast import _C
from esm_fast.ops.attention_varlen import attention_varlen
from esm_fast.ops.gradients import first_order
from esm_fast.ops.pre_ln_attention import rotate
from esm_fast.ops.registry import implements

from .common import BACKEND, empty, follow_torch, require_one_dtype, stream_of, unproven, vectors_of, why_not
from .weights import plain_matrix, prepacked, product_of_rows


class _Inputs(torch.autograd.Function):
    """(x, q, k, v): with the stream passing through, its gradients from both sides meet in one pass over the rows."""

    @staticmethod
    def forward(ctx, x, eps, *tensors):
        ctx.eps = eps
        ctx.save_for_backward(x, *tensors)
        results = [empty(*x.shape, dtype=tensors[2].dtype) for _ in range(3)]
        _C.pre_ln_attention_inputs(x=stream_of(x), **_weights(eps, tensors), results=results)
        return x, *results

    @staticmethod
    @first_order
    def backward(ctx, beside, *gradients):
        x, *tensors = ctx.saved_tensors
        stream, width = stream_of(x), x.shape[1]
        gradients = [g.contiguous() for g in gradients]
        dx, dvectors = torch.empty_like(stream), empty(5, width)
        normed = empty(*x.shape, dtype=tensors[2].dtype)
        _C.pre_ln_attention_inputs_backward(
            x=stream,
            **_weights(ctx.eps, tensors),
            gradients=gradients,
            beside=stream_of(beside),
            dx=dx,
            dvectors=dvectors,
            normed=normed,
        )
        dgain, dln_bias, *dbiases = dvectors
        dmatrices = [
            product_of_rows(g, normed) if w.requires_grad else None
            for g, w in zip(gradients, tensors[2:5], strict=True)
        ]
        found = zip((dx, dgain, dln_bias, *dmatrices, *dbiases), (x, *tensors), strict=True)
        dx, *others = (None if g is None else g.to(t.dtype) for g, t in found)
        return dx, None, *others


def _weights(eps, tensors) -> dict:
    """As the kernels of training take them: of LN, and of q, k and v."""
    follow_torch()
    matrices = [plain_matrix(weight) for weight in tensors[2:5]]
    gain, ln_bias, *biases = vectors_of(matrices[0], *tensors[:2], *tensors[5:])
    return dict(eps=eps, ln_weight=gain, ln_bias=ln_bias, weights=matrices, biases=biases)


class _Output(torch.autograd.Function):
    """x + mixed weight' + bias."""

    @staticmethod
    def forward(ctx, x, mixed, weight, bias):
        follow_torch()
        ctx.save_for_backward(mixed, weight, bias)
        stream, matrix = stream_of(x), plain_matrix(weight)
        (vector,) = vectors_of(matrix, bias)
        result = torch.empty_like(stream)
        mixed = mixed.contiguous()
        _C.pre_ln_attention_output(x=stream, mixed=mixed, weight=matrix, bias=vector, result=result)
        return result.to(x.dtype)

    @staticmethod
    @first_order
    def backward(ctx, incoming):
        follow_torch()
        mixed, weight, bias = ctx.saved_tensors
        dout, matrix = stream_of(incoming), plain_matrix(weight)
        (vector,) = vectors_of(matrix, bias)
        dmixed, dbias = empty(*mixed.shape, dtype=mixed.dtype), empty(len(vector))
        dresult = None if matrix.dtype == dout.dtype else torch.empty_like(dmixed)
        _C.pre_ln_attention_output_backward(
            dout=dout, weight=matrix, bias=vector, dbias=dbias, dmixed=dmixed, dresult=dresult
        )
        dresult = dout if dresult is None else dresult
        dweight = product_of_rows(dresult, mixed) if weight.requires_grad else None
        return incoming, dmixed, dweight, dbias.to(bias.dtype)


def differentiable(
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
    """The op in training; see `registry.Kernel`."""
    (n, width), dim = x.shape, x.shape[1] // heads
    require_one_dtype(q_weight, k_weight, v_weight, out_weight)
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    x, q, k, v = _Inputs.apply(x, eps, ln_weight, ln_bias, *weights, *biases)
    q, k, v = (rows.view(n, heads, dim) for rows in (q, k, v))
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    mixed = attention_varlen(q, k, v, cu_seqlens, max_seqlen, dim**-0.5, backend=BACKEND)
    out = _Output.apply(x, mixed.reshape(n, width), out_weight, out_bias)
    return (out, q, k) if return_qk else out


@implements("pre_ln_attention", backend=BACKEND, why_not=why_not, yields=unproven, differentiable=differentiable)
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
    stream, shape = stream_of(x), (len(x), heads, x.shape[1] // heads)
    result = torch.empty_like(stream)
    gain, bias, q_bias, k_bias, v_bias, out_bias = vectors_of(
        q_weight, ln_weight, ln_bias, q_bias, k_bias, v_bias, out_bias
    )
    q_result, k_result = (empty(*shape, dtype=gain.dtype) for _ in range(2)) if return_qk else (None, None)
    q, k, v, out = prepacked(q_weight, k_weight, v_weight, out_weight)
    _C.pre_ln_attention(
        x=stream,
        cu_seqlens=cu_seqlens.contiguous(),
        heads=heads,
        eps=eps,
        ln_weight=gain,
        ln_bias=bias,
        q=q,
        q_bias=q_bias,
        k=k,
        k_bias=k_bias,
        v=v,
        v_bias=v_bias,
        out=out,
        out_bias=out_bias,
        rotary=None if rotary is None else stream_of(rotary),
        result=result,
        q_result=q_result,
        k_result=k_result,
    )
    result = result.to(x.dtype)
    return (result, q_result, k_result) if return_qk else result
