"""gelu_ffn: LN, then fc1 with bias and GELU in one product, then fc2 with bias and the residual stream in another.

The hidden activation is as wide as four streams: it is written once, in the weights' dtype, and training does not keep
it. The backward makes it again, by one kernel that walks over fc1 and fc2 with one pair of tiles and leaves both the
activation and the gradient before it. The stream is added in fp32.
"""

import triton
import triton.language as tl

from .common import (
    NAMES,
    PRECISIONS,
    capability,
    gelu,
    gelu_slope,
    implements,
    precision,
    require_one_dtype,
    spec,
)
from .configs import linear_config
from .layer_norm import layer_norm, layer_norm_grads
from .linear import add_bias, linear_gelu, linear_residual, place, product, rows_at, tile_of, tiles, weight_grads


@triton.jit(do_not_specialize=["m"])
def gelu_ffn_backward(
    X, FC1, BIAS, GRAD, FC2, HIDDEN, DHIDDEN, m, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gelu(u) and the gradient of u = X FC1^T + bias, from the gradient of the block's output."""
    row, column = tile_of(tl.program_id(0), m, N, BLOCK_M, BLOCK_N)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_at = rows_at(X, row, m, K, BLOCK_M, BLOCK_K)
    u = product(zeros, x_at, FC1, column, N, K, K, 1, BLOCK_N, BLOCK_K, PRECISION)
    u = add_bias(u, BIAS, column, N, BLOCK_N)
    at, exist = place(row, column, m, N, BLOCK_M, BLOCK_N)
    tl.store(HIDDEN + at, gelu(u).to(HIDDEN.dtype.element_ty), mask=exist)
    slope = gelu_slope(u)
    grad_at = rows_at(GRAD, row, m, K, BLOCK_M, BLOCK_K)
    grad = product(zeros, grad_at, FC2, column, N, K, 1, N, BLOCK_N, BLOCK_K, PRECISION)
    tl.store(DHIDDEN + at, (grad * slope).to(DHIDDEN.dtype.element_ty), mask=exist)


def _hidden_grads(normed, fc1_weight, fc1_bias, grad, fc2_weight):
    """(the hidden activation, the gradient before its GELU)."""
    (m, width), hidden = normed.shape, len(fc1_weight)
    config = linear_config("gelu_ffn_backward", capability(normed), normed.dtype)
    activation, dhidden = normed.new_empty(2, m, hidden)
    tensors = (normed, fc1_weight, fc1_bias, grad, fc2_weight, activation, dhidden)
    gelu_ffn_backward[(tiles(config, m, hidden),)](*tensors, m, hidden, width, precision(), **config.launch)
    return activation, dhidden


def _backward(arguments, kept, grad_outputs):
    *tensors, eps = arguments
    x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = (tensor.contiguous() for tensor in tensors)
    stream_grad = grad_outputs[0].contiguous()
    grad = stream_grad.to(fc2_weight.dtype)
    normed = layer_norm(x, ln_weight, ln_bias, eps, fc1_weight.dtype)
    activation, dhidden = _hidden_grads(normed, fc1_weight, fc1_bias, grad, fc2_weight)
    dfc2, dfc2_bias = weight_grads(grad, activation, fc2_bias)
    dfc1, dfc1_bias = weight_grads(dhidden, normed, fc1_bias)
    dx, dgain, dbias = layer_norm_grads(x, ln_weight, dhidden @ fc1_weight, stream_grad, eps)
    return dx, dgain, dbias, dfc1, dfc1_bias, dfc2, dfc2_bias, None


@implements("gelu_ffn", backward=_backward)
def gelu_ffn(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
    """See `esm_fast.ops.gelu_ffn`."""
    require_one_dtype(fc1_weight, fc2_weight)
    x = x.contiguous()
    normed = layer_norm(x, ln_weight.contiguous(), ln_bias.contiguous(), eps, fc1_weight.dtype)
    hidden = linear_gelu(normed, fc1_weight.contiguous(), fc1_bias.contiguous())
    return linear_residual(hidden, fc2_weight.contiguous(), fc2_bias.contiguous(), x)


def compile_specs(capability: int) -> list:
    """ESM-1b's sizes; the forward pass is in `layer_norm` and `linear`."""
    return [
        spec(
            gelu_ffn_backward,
            "*{0} *{0} *{0} *{0} *{0} *{0} *{0} i32".format(NAMES[dtype]),
            dict(N=5120, K=1280, PRECISION=how),
            linear_config("gelu_ffn_backward", capability, dtype),
            direction="bwd",
            dtype=dtype,
        )
        for dtype, how in PRECISIONS
    ]
