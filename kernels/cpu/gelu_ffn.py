"""`gelu_ffn` on the CPU, a layer's second half; in training with a backward of its own."""

import torch

from esm_fast import _C
from esm_fast.ops.registry import implements

from .common import BACKEND, empty, follow_torch, require_one_dtype, stream_of, unproven, vectors_of, why_not
from .weights import plain_matrix, prepacked, product_of_rows


def _weights(gain, ln_bias, fc1, bias1, fc2, bias2, eps) -> dict:
    """As the kernels of training take them."""
    follow_torch()
    require_one_dtype(fc1, fc2)
    gain, ln_bias, bias1, bias2 = vectors_of(fc1, gain, ln_bias, bias1, bias2)
    matrices = dict(fc1_weight=plain_matrix(fc1), fc2_weight=plain_matrix(fc2))
    return dict(eps=eps, ln_weight=gain, ln_bias=ln_bias, fc1_bias=bias1, fc2_bias=bias2, **matrices)


def train(x, *weights_and_eps):
    """The result, and what GELU is given, for the backward pass."""
    fc1 = weights_and_eps[2]
    stream = stream_of(x)
    result, middle = torch.empty_like(stream), empty(len(x), len(fc1), dtype=fc1.dtype)
    _C.gelu_ffn_train(x=stream, **_weights(*weights_and_eps), middle=middle, result=result)
    return result.to(x.dtype), (middle,)


def backward(arguments, kept, grad_outputs):
    x, *weights, eps = arguments
    stream, dout, (middle,) = stream_of(x), stream_of(grad_outputs[0]), kept
    fc1, fc2 = weights[2], weights[4]
    hidden, width = fc1.shape
    dx, dvectors = torch.empty_like(stream), empty(3 * width + hidden)
    normed = empty(*x.shape, dtype=fc1.dtype)
    dmiddle, activated = torch.empty_like(middle), torch.empty_like(middle)
    dresult = None if fc1.dtype == dout.dtype else torch.empty_like(normed)
    _C.gelu_ffn_backward(
        x=stream,
        **_weights(*weights, eps),
        middle=middle,
        dout=dout,
        dx=dx,
        dvectors=dvectors,
        normed=normed,
        dmiddle=dmiddle,
        activated=activated,
        dresult=dresult,
    )
    dgain, dln_bias, dbias2, dbias1 = dvectors.split([width, width, width, hidden])
    dresult = dout if dresult is None else dresult
    dfc1 = product_of_rows(dmiddle, normed) if fc1.requires_grad else None
    dfc2 = product_of_rows(dresult, activated) if fc2.requires_grad else None
    gradients = (dx, dgain, dln_bias, dfc1, dbias1, dfc2, dbias2)
    return *(None if g is None else g.to(v.dtype) for g, v in zip(gradients, arguments[:-1], strict=True)), None


@implements("gelu_ffn", backend=BACKEND, why_not=why_not, yields=unproven, train=train, backward=backward)
def gelu_ffn(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
    """See `esm_fast.ops.gelu_ffn`."""
    follow_torch()
    require_one_dtype(fc1_weight, fc2_weight)
    stream = stream_of(x)
    result = torch.empty_like(stream)
    gain, bias, bias1, bias2 = vectors_of(fc1_weight, ln_weight, ln_bias, fc1_bias, fc2_bias)
    fc1, fc2 = prepacked(fc1_weight, fc2_weight)
    _C.gelu_ffn(
        x=stream,
        eps=eps,
        ln_weight=gain,
        ln_bias=bias,
        fc1=fc1,
        fc1_bias=bias1,
        fc2=fc2,
        fc2_bias=bias2,
        result=result,
    )
    return result.to(x.dtype)
