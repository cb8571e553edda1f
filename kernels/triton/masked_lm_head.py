"""masked_lm_head on the rows asked for: dense with bias and GELU in one product, which picks them and rounds them to
the weights' dtype as it reads; LN, projection and loss in another.

The second kernel walks over its rows' hidden values three times, for the mean, the variance and the product with the
token table; only the first time they come from memory. The logits' softmax happens in registers, and each row's loss is
a number of its own, so that the sum has one order. The backward keeps the logits and makes the hidden values again.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .common import (
    NAMES,
    PRECISIONS,
    capability,
    gelu,
    gelu_slope,
    implements,
    padded,
    precision,
    require_one_dtype,
    spec,
)
from .configs import Config, linear_config
from .gather import scatter_sum
from .linear import add_bias, input_grads, place, product, tile_of, tiles, weight_grads

_IGNORED = tl.constexpr(-100)  # the target that torch's cross-entropy leaves out
_CHUNK = 16  # rows a program of the backward sums up for the gradients of gain and bias
_BACKWARD = Config({}, 8, 1)


def project_config(dtype: torch.dtype) -> Config:
    rows, warps = (16, 4) if dtype == torch.float32 else (64, 4)
    return Config(dict(ROWS=rows, BLOCK=64), warps, 2)


@triton.jit(do_not_specialize=["m"])
def lm_dense(
    X, CHOSEN, W, BIAS, OUT, m, WIDTH: tl.constexpr, CHOOSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gelu(x W^T + bias) for the rows of X in CHOSEN, or for the first m."""
    row, column = tile_of(tl.program_id(0), m, WIDTH, BLOCK_M, BLOCK_N)
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), m - 1)
    if CHOOSE:
        rows = tl.load(CHOSEN + rows)
    x_at = X + rows.to(tl.int64)[:, None] * WIDTH + tl.arange(0, BLOCK_K)[None, :]
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    out = product(out, x_at, W, column, WIDTH, WIDTH, WIDTH, 1, BLOCK_N, BLOCK_K, PRECISION)
    out = gelu(add_bias(out, BIAS, column, WIDTH, BLOCK_N))
    at, exist = place(row, column, m, WIDTH, BLOCK_M, BLOCK_N)
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=exist)


@triton.jit
def _hidden(HIDDEN, rows, columns, m, WIDTH: tl.constexpr):
    exist = (rows < m)[:, None] & (columns < WIDTH)[None, :]
    at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    return tl.load(HIDDEN + at, mask=exist, other=0.0).to(tl.float32), exist


@triton.jit(do_not_specialize=["m"])
def lm_project(
    HIDDEN, GAIN, BIAS, TABLE, TABLE_BIAS, TARGETS, LOGITS, LOSSES, m, eps,
    WIDTH: tl.constexpr, VOCABULARY: tl.constexpr, TOKENS: tl.constexpr, LOSS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LN(hidden) TABLE^T + bias for a tile of rows, and each row's cross-entropy. TOKENS: the vocabulary, padded."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mean = tl.zeros([ROWS], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        x, _ = _hidden(HIDDEN, rows, first + tl.arange(0, BLOCK), m, WIDTH)
        mean += tl.sum(x, 1) / WIDTH
    variance = tl.zeros([ROWS], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        x, exist = _hidden(HIDDEN, rows, first + tl.arange(0, BLOCK), m, WIDTH)
        centred = tl.where(exist, x - mean[:, None], 0.0)
        variance += tl.sum(centred * centred, 1) / WIDTH
    rstd = tl.rsqrt(variance + eps)
    token = tl.arange(0, TOKENS)
    logits = tl.zeros([ROWS, TOKENS], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < WIDTH
        x, _ = _hidden(HIDDEN, rows, columns, m, WIDTH)
        gain = tl.load(GAIN + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(BIAS + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        normed = (x - mean[:, None]) * rstd[:, None] * gain + bias
        table = tl.load(
            TABLE + token[None, :] * WIDTH + columns[:, None],
            mask=inside[:, None] & (token < VOCABULARY)[None, :],
            other=0.0,
        )
        logits = tl.dot(normed.to(table.dtype), table, logits, input_precision=PRECISION)
    known = (token < VOCABULARY)[None, :]
    logits += tl.load(TABLE_BIAS + token, mask=token < VOCABULARY, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * VOCABULARY + token[None, :]
    tl.store(LOGITS + at, logits.to(LOGITS.dtype.element_ty), mask=(rows < m)[:, None] & known)
    if LOSS:
        target = tl.load(TARGETS + rows, mask=rows < m, other=_IGNORED)
        logits = tl.where(known, logits, float("-inf"))
        top = tl.max(logits, 1)
        lse = top + tl.log(tl.sum(tl.exp(logits - top[:, None]), 1))
        right = tl.sum(tl.where(token[None, :] == target[:, None], logits, 0.0), 1)
        tl.store(LOSSES + rows, tl.where(target == _IGNORED, 0.0, lse - right), mask=rows < m)


@triton.jit(do_not_specialize=["m"])
def lm_hidden_backward(
    U, GAIN, BIAS, DNORMED, NORMED, DU, DGAIN, DBIAS, m, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For normed = LN(gelu(u)): normed again, the gradient of u, and this program's share of those of gain and bias."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gain = tl.load(GAIN + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + columns, mask=inside, other=0.0).to(tl.float32)
    dgain, dbias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * CHUNK
    for row in range(first, tl.minimum(first + CHUNK, m)):
        at = tl.cast(row, tl.int64) * WIDTH + columns
        u = tl.load(U + at, mask=inside, other=0.0).to(tl.float32)
        hidden = gelu(u)
        centred = tl.where(inside, hidden - tl.sum(hidden, 0) / WIDTH, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
        normed = centred * rstd
        tl.store(NORMED + at, (normed * gain + bias).to(NORMED.dtype.element_ty), mask=inside)
        dout = tl.load(DNORMED + at, mask=inside, other=0.0).to(tl.float32)
        dgain += dout * normed
        dbias += dout
        dnormed = dout * gain
        along = tl.sum(dnormed * normed, 0) / WIDTH
        dhidden = (dnormed - tl.sum(dnormed, 0) / WIDTH - normed * along) * rstd
        tl.store(DU + at, (dhidden * gelu_slope(u)).to(DU.dtype.element_ty), mask=inside)
    share = tl.program_id(0).to(tl.int64) * WIDTH + columns
    tl.store(DGAIN + share, dgain, mask=inside)
    tl.store(DBIAS + share, dbias, mask=inside)


def _train(x, dense_weight, dense_bias, ln_weight, ln_bias, token_table, bias, rows, targets, eps):
    require_one_dtype(dense_weight, token_table)
    hidden = _dense(x.contiguous(), dense_weight.contiguous(), dense_bias.contiguous(), rows)
    (m, width), vocabulary = hidden.shape, len(token_table)
    config = project_config(hidden.dtype)
    logits = hidden.new_empty(m, vocabulary)
    losses = hidden.new_empty(m, dtype=torch.float32)
    vectors = (tensor.contiguous() for tensor in (ln_weight, ln_bias, token_table, bias))
    lost = targets is not None
    answers = targets.contiguous() if lost else losses
    lm_project[(triton.cdiv(m, config.tiles["ROWS"]),)](
        hidden, *vectors, answers, logits, losses, m, eps,
        width, vocabulary, _padded_vocabulary(vocabulary), lost, precision(), **config.launch,
    )  # fmt: skip
    return (logits, losses.sum() if lost else None), (logits,)


def _dense(x, weight, bias, rows):
    m, width = len(x) if rows is None else len(rows), x.shape[1]
    out = weight.new_empty(m, width)
    config = linear_config("lm_dense", capability(x), weight.dtype)
    choose = rows is not None
    tensors = (x, rows.contiguous() if choose else x, weight, bias, out)
    lm_dense[(tiles(config, m, width),)](*tensors, m, width, choose, precision(), **config.launch)
    return out


def _chosen(x, rows, dtype):
    return (x if rows is None else x[rows]).to(dtype).contiguous()


def _padded_vocabulary(vocabulary: int) -> int:
    return max(64, padded(vocabulary))


def _backward(arguments, kept, grad_outputs):
    x, dense_weight, dense_bias, ln_weight, ln_bias, token_table, bias, rows, targets, eps = arguments
    dlogits = _logits_grad(kept[0], targets, *grad_outputs).to(token_table.dtype)
    chosen = _chosen(x, rows, dense_weight.dtype)
    u = F.linear(chosen, dense_weight, dense_bias)
    normed, du, dgain, dbias = _hidden_grads(u, ln_weight, ln_bias, dlogits @ token_table, eps)
    dtable, dtable_bias = weight_grads(dlogits, normed, bias)
    ddense, ddense_bias = weight_grads(du, chosen, dense_bias)
    dx = input_grads((du,), (dense_weight.contiguous(),), x.dtype if rows is None else du.dtype)
    if rows is not None:
        dx = scatter_sum(dx, rows, len(x), x.dtype)
    return dx, ddense, ddense_bias, dgain, dbias, dtable, dtable_bias, None, None, None


def _logits_grad(logits, targets, grad_logits, grad_loss):
    """In fp32; 33 numbers a row, so that torch's own operations do."""
    if targets is None:
        return grad_logits.float()
    right = torch.arange(logits.shape[1], dtype=torch.int64, device=logits.device) == targets[:, None]
    slope = (logits.float().softmax(-1) - right.float()).masked_fill((targets == -100)[:, None], 0.0)
    return slope * grad_loss + grad_logits.float()


def _hidden_grads(u, ln_weight, ln_bias, dnormed, eps):
    m, width = u.shape
    programs = triton.cdiv(m, _CHUNK)
    normed, du = torch.empty(2, m, width, dtype=u.dtype, device=u.device)
    dgain, dbias = torch.empty(2, programs, width, dtype=torch.float32, device=u.device)
    tensors = (u, ln_weight.contiguous(), ln_bias.contiguous(), dnormed.contiguous(), normed, du, dgain, dbias)
    lm_hidden_backward[(programs,)](*tensors, m, eps, width, padded(width), _CHUNK, **_BACKWARD.launch)
    return normed, du, dgain.sum(0).to(ln_weight.dtype), dbias.sum(0).to(ln_bias.dtype)


@implements("masked_lm_head", backward=_backward, train=_train)
def masked_lm_head(*arguments):
    """See `esm_fast.ops.masked_lm_head`."""
    return _train(*arguments)[0]


def compile_specs(capability: int) -> list:
    """ESM-1b's sizes, with the loss and without, on all rows of the fp32 stream and on some."""
    shape = dict(WIDTH=1280, VOCABULARY=33, TOKENS=_padded_vocabulary(33))
    given = (
        (lm_dense, "*fp32 *fp32 *{0} *{0} *{0} i32", dict(WIDTH=1280, CHOOSE=False)),
        (lm_dense, "*fp32 *i64 *{0} *{0} *{0} i32", dict(WIDTH=1280, CHOOSE=True)),
        (lm_project, "*{0} *{0} *{0} *{0} *{0} *fp32 *{0} *fp32 i32 fp32", shape | dict(LOSS=False)),
        (lm_project, "*{0} *{0} *{0} *{0} *{0} *i64 *{0} *fp32 i32 fp32", shape | dict(LOSS=True)),
    )
    forward = [
        spec(
            kernel,
            types.format(NAMES[dtype]),
            fixed | dict(PRECISION=how),
            linear_config("lm_dense", capability, dtype) if kernel is lm_dense else project_config(dtype),
            direction="fwd",
            dtype=dtype,
        )
        for dtype, how in PRECISIONS
        for kernel, types, fixed in given
    ]
    backward = [
        spec(
            lm_hidden_backward,
            f"*{name} *{name} *{name} *{name} *{name} *{name} *fp32 *fp32 i32 fp32",
            dict(WIDTH=1280, BLOCK=padded(1280), CHUNK=_CHUNK),
            _BACKWARD,
            direction="bwd",
            dtype=dtype,
        )
        for dtype, name in NAMES.items()
    ]
    return forward + backward
