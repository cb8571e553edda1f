"""Matrix products with what follows them in the same kernel: bias, GELU, residual.

The products are ours rather than cuBLAS's because that picks another algorithm, with another order of summation, for
another number of rows, so that a protein's bits would depend on its batch. Here a row's sum over k runs in one order
whatever lies around it. Gradients, which sum over the whole batch anyway, use torch's products, except where that would
take several passes over the result.
"""

import torch
import triton
import triton.language as tl

from .common import NAMES, PRECISIONS, capability, gelu, precision, spec
from .configs import linear_config

_BAND = tl.constexpr(8)  # tiles of rows that are walked through together, so that their operands stay in the L2 cache


@triton.jit
def tile_of(tile, m, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first row, first column) of a tile: down a band of rows, then one tile to the right, and so on."""
    band = _BAND * tl.cdiv(N, BLOCK_N)
    top = tile // band * _BAND
    height = tl.minimum(tl.cdiv(m, BLOCK_M) - top, _BAND)
    return (top + tile % band % height) * BLOCK_M, tile % band // height * BLOCK_N


@triton.jit
def rows_at(A, row, m, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where a tile of rows of A, (m, K), begins. Those beyond the end repeat the last: what they give is not stored."""
    rows = tl.minimum(tl.arange(0, BLOCK_M), m - 1 - row)
    return A + row.to(tl.int64) * K + rows[:, None] * K + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def product(
    total, a_at, W, column, N: tl.constexpr, K: tl.constexpr, W_N: tl.constexpr, W_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total plus the rows at a_at, K wide, times columns of a matrix of N; W_N and W_K are that matrix's strides.

    Columns beyond the end repeat the last one, as rows do; where they lie side by side they are masked instead, since a
    column that may be any other one is loaded by itself, two bytes at a time.
    """
    k = tl.arange(0, BLOCK_K)
    columns = column + tl.arange(0, BLOCK_N)
    if W_N != 1:
        columns = tl.minimum(columns, N - 1)
    w_at = W + columns[None, :] * W_N + k[:, None] * W_K
    for first in range(0, K, BLOCK_K):
        a = tl.load(a_at) if K % BLOCK_K == 0 else tl.load(a_at, mask=first + k[None, :] < K, other=0.0)
        if W_N == 1 and N % BLOCK_N != 0:
            w = tl.load(w_at, mask=(columns[None, :] < N) & (first + k[:, None] < K), other=0.0)
        elif K % BLOCK_K == 0:
            w = tl.load(w_at)
        else:
            w = tl.load(w_at, mask=first + k[:, None] < K, other=0.0)
        total = tl.dot(a.to(w.dtype), w, total, input_precision=PRECISION)
        a_at += BLOCK_K
        w_at += BLOCK_K * W_K
    return total


@triton.jit
def add_bias(tile, BIAS, column, N: tl.constexpr, BLOCK_N: tl.constexpr):
    columns = column + tl.arange(0, BLOCK_N)
    return tile + tl.load(BIAS + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def place(row, column, m, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of a tile's elements in (m, N), and which of them exist."""
    rows, columns = row + tl.arange(0, BLOCK_M)[:, None], column + tl.arange(0, BLOCK_N)[None, :]
    return rows.to(tl.int64) * N + columns, (rows < m) & (columns < N)


@triton.jit(do_not_specialize=["m"])
def linear(
    A, W, BIAS, RESIDUAL, OUT, m, N: tl.constexpr, K: tl.constexpr, THEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gelu(A W^T + bias), or the residual stream plus A W^T + bias."""
    row, column = tile_of(tl.program_id(0), m, N, BLOCK_M, BLOCK_N)
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    a_at = rows_at(A, row, m, K, BLOCK_M, BLOCK_K)
    out = product(out, a_at, W, column, N, K, K, 1, BLOCK_N, BLOCK_K, PRECISION)
    out = add_bias(out, BIAS, column, N, BLOCK_N)
    at, exist = place(row, column, m, N, BLOCK_M, BLOCK_N)
    if THEN == "gelu":
        out = gelu(out)
    else:
        out += tl.load(RESIDUAL + at, mask=exist, other=0.0).to(tl.float32)
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["m"])
def input_grad(
    GRAD1, GRAD2, GRAD3, W1, W2, W3, OUT, m,
    N: tl.constexpr, K: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """GRAD1 W1, or the sum of three such products: the gradient of what one or three linear layers take in."""
    row, column = tile_of(tl.program_id(0), m, N, BLOCK_M, BLOCK_N)
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    at1 = rows_at(GRAD1, row, m, K, BLOCK_M, BLOCK_K)
    out = product(out, at1, W1, column, N, K, 1, N, BLOCK_N, BLOCK_K, PRECISION)
    if TERMS == 3:
        at2 = rows_at(GRAD2, row, m, K, BLOCK_M, BLOCK_K)
        out = product(out, at2, W2, column, N, K, 1, N, BLOCK_N, BLOCK_K, PRECISION)
        at3 = rows_at(GRAD3, row, m, K, BLOCK_M, BLOCK_K)
        out = product(out, at3, W3, column, N, K, 1, N, BLOCK_N, BLOCK_K, PRECISION)
    at, exist = place(row, column, m, N, BLOCK_M, BLOCK_N)
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=exist)


def tiles(config, m: int, n: int) -> int:
    """How many tiles an (m, n) result has."""
    return triton.cdiv(m, config.tiles["BLOCK_M"]) * triton.cdiv(n, config.tiles["BLOCK_N"])


def _linear(a, weight, bias, residual, out, then):
    (m, k), n = a.shape, len(weight)
    config = linear_config(f"linear_{then}", capability(a), a.dtype)
    linear[(tiles(config, m, n),)](a, weight, bias, residual, out, m, n, k, then, precision(), **config.launch)
    return out


def linear_gelu(a, weight, bias):
    """gelu(a weight^T + bias) in a's dtype; all contiguous."""
    out = a.new_empty(len(a), len(weight))
    return _linear(a, weight, bias, out, out, "gelu")


def linear_residual(a, weight, bias, residual):
    """residual + a weight^T + bias in the residual stream's dtype; all contiguous."""
    return _linear(a, weight, bias, residual, torch.empty_like(residual), "residual")


def input_grads(grads, weights, dtype):
    """The gradient, in `dtype`, of the input of one or three linear layers of one shape; all contiguous."""
    (m, k), n = grads[0].shape, weights[0].shape[1]
    out = grads[0].new_empty(m, n, dtype=dtype)
    config = linear_config("input_grad", capability(out), grads[0].dtype)
    tensors = (*(tensors[i % len(tensors)] for tensors in (grads, weights) for i in range(3)), out)
    input_grad[(tiles(config, m, n),)](*tensors, m, n, k, len(grads), precision(), **config.launch)
    return out


def weight_grads(grad, inputs, like):
    """Gradients of the weight and bias of a linear layer, the bias's summed in fp32."""
    return grad.T @ inputs, grad.sum(0, dtype=torch.float32).to(like.dtype)


def compile_specs(capability: int) -> list:
    """fc1, fc2 and the output projection of ESM-1b; and the gradients of what the language model's head takes in, all
    rows of the fp32 stream or some, and the projections to q, k and v."""
    products = (
        (linear, "*{0} *{0} *{0} *{0} *{0} i32", dict(N=5120, K=1280, THEN="gelu")),
        (linear, "*{0} *{0} *{0} *fp32 *fp32 i32", dict(N=1280, K=5120, THEN="residual")),
        (linear, "*{0} *{0} *{0} *fp32 *fp32 i32", dict(N=1280, K=1280, THEN="residual")),
        (input_grad, "*{0} *{0} *{0} *{0} *{0} *{0} *fp32 i32", dict(N=1280, K=1280, TERMS=1)),
        (input_grad, "*{0} *{0} *{0} *{0} *{0} *{0} *{0} i32", dict(N=1280, K=1280, TERMS=1)),
        (input_grad, "*{0} *{0} *{0} *{0} *{0} *{0} *{0} i32", dict(N=1280, K=1280, TERMS=3)),
    )
    return [
        spec(
            kernel,
            types.format(NAMES[dtype]),
            shape | dict(PRECISION=how),
            linear_config(f"linear_{shape['THEN']}" if kernel is linear else "input_grad", capability, dtype),
            direction="fwd" if kernel is linear else "bwd",
            dtype=dtype,
        )
        for dtype, how in PRECISIONS
        for kernel, types, shape in products
    ]
