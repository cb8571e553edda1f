"""gelu_ffn: the norm and the GELU are kernels here, the products cuBLAS's through torch."""

import torch

from .bias_gelu import bias_gelu, bias_gelu_grads
from .common import implements, of_dtype, require_one_dtype
from .layer_norm import layer_norm, layer_norm_grads
from .sums import column_sums


def _prepared(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    require_one_dtype(fc1_weight, fc2_weight)
    (x,) = of_dtype(torch.float32, x)
    vectors = of_dtype(fc1_weight.dtype, ln_weight, ln_bias, fc1_bias, fc2_bias)
    return x, *vectors


def _backward(arguments, kept, grad_outputs):
    *tensors, eps = arguments
    x, gain, bias, fc1_bias, _ = _prepared(*tensors)
    _, _, _, fc1_weight, _, fc2_weight, _ = tensors
    stream_grad = grad_outputs[0].float().contiguous()
    grad = stream_grad.to(fc2_weight.dtype)
    normed, statistics = layer_norm(x, gain, bias, eps, keep_statistics=True)
    h = normed @ fc1_weight.T
    activation = bias_gelu(h, fc1_bias)
    dh, dfc1_bias = bias_gelu_grads(h, fc1_bias, grad @ fc2_weight)
    dx, dgain, dbias = layer_norm_grads(x, gain, dh @ fc1_weight, statistics, stream_grad)
    dfc2_bias = column_sums(stream_grad, fc2_weight.dtype)
    return dx.to(tensors[0].dtype), dgain, dbias, dh.T @ normed, dfc1_bias, grad.T @ activation, dfc2_bias, None


@implements("gelu_ffn", backward=_backward)
def gelu_ffn(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
    """See `esm_fast.ops.gelu_ffn`."""
    stream, gain, bias, fc1_bias, fc2_bias = _prepared(
        x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    )
    normed, _ = layer_norm(stream, gain, bias, eps)
    hidden = bias_gelu(normed @ fc1_weight.T, fc1_bias)
    return x + torch.addmm(fc2_bias, hidden, fc2_weight.T)
