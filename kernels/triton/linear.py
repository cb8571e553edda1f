"""Matrix products with what follows them in the same kernel: bias, GELU, residual.

The products are ours rather than cuBLAS's because that picks another algorithm, with another order of summation, for
another number of rows, so that a protein's bits would depend on its batch. Here a row's sum over k runs in one order
whatever lies around it. Gradients, which sum over the whole batch anyway, use torch's products.
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
def product(
    A, W, row, column, m, N: tl.constexpr, K: tl.constexpr, W_N: tl.constexpr, W_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile at (row, column) of A times a matrix of N columns, fp32; W_N and W_K are that matrix's strides.

    Rows and columns beyond the end repeat the last one: what they give is never stored.
    """
    k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(tl.arange(0, BLOCK_M), m - 1 - row)
    columns = tl.minimum(column + tl.arange(0, BLOCK_N), N - 1)
    a_at = A + row.to(tl.int64) * K + rows[:, None] * K + k[None, :]
    w_at = W + columns[None, :] * W_N + k[:, None] * W_K
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a, w = tl.load(a_at), tl.load(w_at)
        else:
            a = tl.load(a_at, mask=first + k[None, :] < K, other=0.0)
            w = tl.load(w_at, mask=first + k[:, None] < K, other=0.0)
        total = tl.dot(a, w, total, input_precision=PRECISION)
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
    out = product(A, W, row, column, m, N, K, K, 1, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    out = add_bias(out, BIAS, column, N, BLOCK_N)
    at, exist = place(row, column, m, N, BLOCK_M, BLOCK_N)
    if THEN == "gelu":
        out = gelu(out)
    else:
        out += tl.load(RESIDUAL + at, mask=exist, other=0.0).to(tl.float32)
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=exist)


def tiles(config, m: int, n: int) -> int:
    """How many tiles an (m, n) result has."""
    return triton.cdiv(m, config.tiles["BLOCK_M"]) * triton.cdiv(n, config.tiles["BLOCK_N"])


def _linear(a, weight, bias, residual, out, then):
    (m, k), n = a.shape, len(weight)
    config = linear_config("linear", capability(a), a.dtype)
    linear[(tiles(config, m, n),)](a, weight, bias, residual, out, m, n, k, then, precision(), **config.launch)
    return out


def linear_gelu(a, weight, bias):
    """gelu(a weight^T + bias) in a's dtype; all contiguous."""
    out = a.new_empty(len(a), len(weight))
    return _linear(a, weight, bias, out, out, "gelu")


def linear_residual(a, weight, bias, residual):
    """residual + a weight^T + bias in the residual stream's dtype; all contiguous."""
    return _linear(a, weight, bias, residual, torch.empty_like(residual), "residual")


def weight_grads(grad, inputs, like):
    """Gradients of the weight and bias of a linear layer, the bias's summed in fp32."""
    return grad.T @ inputs, grad.sum(0, dtype=torch.float32).to(like.dtype)


def compile_specs(capability: int) -> list:
    """fc1 and fc2 of ESM-1b; the output projection is like fc2, but shorter."""
    return [
        spec(
            linear,
            types.format(NAMES[dtype]),
            dict(N=n, K=k, THEN=then, PRECISION=how),
            linear_config("linear", capability, dtype),
            gemm=(dtype, how) != (torch.float32, "ieee"),
            direction="fwd",
            dtype=dtype,
        )
        for dtype, how in PRECISIONS
        for types, n, k, then in (
            ("*{0} *{0} *{0} *{0} *{0} i32", 5120, 1280, "gelu"),
            ("*{0} *{0} *{0} *fp32 *fp32 i32", 1280, 5120, "residual"),
        )
    ]
