"""`pre_ln_attention` in training: attention with its own backward, and what surrounds it with its own, too."""

import torch
from torch.autograd.function import once_differentiable

from esm_fast import _C
from esm_fast.ops.attention_varlen import attention_varlen
from esm_fast.ops.pre_ln_attention import rotate
from esm_fast.packed import NAMES

from .common import BACKEND, follow_torch, require_one_dtype, stream_of, vectors_of
from .training import plain_matrix, product_of_rows


def attention_with_gradients(
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


class _Inputs(torch.autograd.Function):
    """(x, q, k, v): with the stream passing through, its gradients from both sides meet in one pass over the rows."""

    @staticmethod
    def forward(ctx, x, eps, *tensors):
        ctx.eps = eps
        ctx.save_for_backward(x, *tensors)
        results = [torch.empty(x.shape, dtype=tensors[2].dtype) for _ in range(3)]
        _inputs(_C.attention_inputs, stream_of(x), eps, tensors, results)
        return x, *results

    @staticmethod
    @once_differentiable
    def backward(ctx, beside, *gradients):
        x, *tensors = ctx.saved_tensors
        stream, width = stream_of(x), x.shape[1]
        gradients = [g.contiguous() for g in gradients]
        dx, dvectors = torch.empty_like(stream), torch.empty(5, width)
        normed = torch.empty(x.shape, dtype=tensors[2].dtype)
        outgoing = stream_of(beside), dx, dvectors, normed
        _inputs(_C.attention_inputs_backward, stream, ctx.eps, tensors, gradients, *outgoing)
        dgain, dln_bias, *dbiases = dvectors
        dmatrices = [
            product_of_rows(g, normed) if w.requires_grad else None
            for g, w in zip(gradients, tensors[2:5], strict=True)
        ]
        found = zip((dx, dgain, dln_bias, *dmatrices, *dbiases), (x, *tensors), strict=True)
        dx, *others = (None if g is None else g.to(t.dtype) for g, t in found)
        return dx, None, *others


def _inputs(kernel, stream, eps, tensors, results, *outgoing):
    follow_torch()
    matrices = [plain_matrix(weight) for weight in tensors[2:5]]
    gain, ln_bias, *biases = vectors_of(matrices[0], *tensors[:2], *tensors[5:])
    addresses = ([tensor.data_ptr() for tensor in three] for three in (matrices, biases, results))
    kernel(
        stream.data_ptr(),
        *stream.shape,
        eps,
        NAMES[matrices[0].dtype],
        gain.data_ptr(),
        ln_bias.data_ptr(),
        *addresses,
        *(tensor.data_ptr() for tensor in outgoing),
    )


class _Output(torch.autograd.Function):
    """x + mixed weight' + bias."""

    @staticmethod
    def forward(ctx, x, mixed, weight, bias):
        follow_torch()
        ctx.save_for_backward(mixed, weight, bias)
        stream, matrix = stream_of(x), plain_matrix(weight)
        (vector,) = vectors_of(matrix, bias)
        result = torch.empty_like(stream)
        pointers = (tensor.data_ptr() for tensor in (mixed, matrix, vector, result))
        _C.attention_output(stream.data_ptr(), *stream.shape, NAMES[matrix.dtype], *pointers)
        return result.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming):
        follow_torch()
        mixed, weight, bias = ctx.saved_tensors
        dout, matrix = stream_of(incoming), plain_matrix(weight)
        (vector,) = vectors_of(matrix, bias)
        dmixed, dbias = torch.empty_like(mixed), torch.empty(len(vector))
        dresult = dout if matrix.dtype == dout.dtype else torch.empty_like(mixed)
        _C.attention_output_backward(
            dout.data_ptr(),
            *dout.shape,
            NAMES[matrix.dtype],
            matrix.data_ptr(),
            vector.data_ptr(),
            dbias.data_ptr(),
            dmixed.data_ptr(),
            0 if dresult is dout else dresult.data_ptr(),
        )
        dweight = product_of_rows(dresult, mixed) if weight.requires_grad else None
        return incoming, dmixed, dweight, dbias.to(bias.dtype)
