"""embedding: LN(scale * E[token] + P[position]) in one pass over the rows.

The token-dropout factor of every row comes from a first kernel, one program a sequence, which counts its <mask> tokens:
0 for them, the sequence's factor for the others. The tables' gradients are sums over rows of one token or position.
Tokens and positions must lie in their tables: nothing here can say so without waiting for the GPU.
"""

import torch
import triton
import triton.language as tl

from esm_fast.alphabet import MASK, PAD
from esm_fast.ops.embedding import KEPT_IN_TRAINING, added

from .common import NAMES, implements, padded, spec
from .configs import Config
from .gather import scatter_sum
from .layer_norm import layer_norm_grads

_MASK, _KEPT = tl.constexpr(MASK), tl.constexpr(KEPT_IN_TRAINING)
_COUNT = Config(dict(TILE=1024), 4, 1)
_EMBED = Config({}, 4, 1)


@triton.jit
def token_factors(TOKENS, CU, SCALE, FACTORS, GIVEN: tl.constexpr, TILE: tl.constexpr):
    """What each row of one sequence is multiplied by: SCALE[sequence] if GIVEN, else to make up for its <mask>s."""
    sequence = tl.program_id(0)
    start, end = tl.load(CU + sequence), tl.load(CU + sequence + 1)
    if GIVEN:
        scale = tl.load(SCALE + sequence).to(tl.float32)
    else:
        masked = tl.zeros([TILE], tl.int32)
        for first in range(start, end, TILE):
            row = first + tl.arange(0, TILE)
            masked += (tl.load(TOKENS + row, mask=row < end, other=0) == _MASK).to(tl.int32)
        scale = _KEPT / (1.0 - tl.sum(masked, 0).to(tl.float32) / (end - start).to(tl.float32))
    for first in range(start, end, TILE):
        row = first + tl.arange(0, TILE)
        token = tl.load(TOKENS + row, mask=row < end, other=0)
        tl.store(FACTORS + row, tl.where(token == _MASK, 0.0, scale), mask=row < end)


@triton.jit
def embed_rows(
    TOKENS, POSITIONS, FACTORS, E, P, GAIN, BIAS, OUT, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    exist = columns < WIDTH
    token, position = tl.load(TOKENS + row).to(tl.int64), tl.load(POSITIONS + row).to(tl.int64)
    x = tl.load(E + token * WIDTH + columns, mask=exist, other=0.0).to(tl.float32)
    if DROPOUT:
        x *= tl.load(FACTORS + row)
    x += tl.load(P + position * WIDTH + columns, mask=exist, other=0.0).to(tl.float32)
    if NORM:
        centred = tl.where(exist, x - tl.sum(x, 0) / WIDTH, 0.0)
        x = centred * tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
        x *= tl.load(GAIN + columns, mask=exist, other=0.0).to(tl.float32)
        x += tl.load(BIAS + columns, mask=exist, other=0.0).to(tl.float32)
    tl.store(OUT + row.to(tl.int64) * WIDTH + columns, x, mask=exist)


def _factors(tokens, cu_seqlens, token_dropout, scale):
    if not token_dropout:
        return None
    factors = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    given = scale is not None
    token_factors[(len(cu_seqlens) - 1,)](
        tokens, cu_seqlens, scale if given else factors, factors, given, **_COUNT.launch
    )
    return factors


def _rows(tokens, positions, factors, tables, norm, eps):
    n, width = len(tokens), tables[0].shape[1]
    out = torch.empty(n, width, dtype=torch.float32, device=tokens.device)
    gain, bias = norm or tables
    dropout = factors if factors is not None else out
    tensors = (tokens, positions, dropout, *tables, gain, bias, out)
    flags = (factors is not None, norm is not None)
    embed_rows[(n,)](*tensors, eps, width, padded(width), *flags, **_EMBED.launch)
    return out


def _train(tokens, positions, cu_seqlens, token_table, position_table, ln_weight, ln_bias, token_dropout, scale, eps):
    positions, position_table = added(positions, token_table, position_table)
    tokens, positions = tokens.contiguous(), positions.contiguous()
    tables = token_table.contiguous(), position_table.contiguous()
    factors = _factors(tokens, cu_seqlens.contiguous(), token_dropout, scale)
    norm = None if ln_weight is None else (ln_weight.contiguous(), ln_bias.contiguous())
    return _rows(tokens, positions, factors, tables, norm, eps), () if factors is None else (factors,)


def _backward(arguments, kept, grad_outputs):
    tokens, positions, cu_seqlens, token_table, position_table, ln_weight, _, token_dropout, scale, eps = arguments
    positions, position_table = added(positions, token_table, position_table)
    factors = kept[0] if token_dropout else None
    grad = grad_outputs[0].contiguous()
    dgain = dbias = dscale = None
    if ln_weight is not None:
        tables = token_table.contiguous(), position_table.contiguous()
        x = _rows(tokens.contiguous(), positions.contiguous(), factors, tables, None, eps)
        grad, dgain, dbias = layer_norm_grads(x, ln_weight.contiguous(), grad, torch.zeros_like(grad), eps)
    if token_dropout and scale is not None:
        dscale = _scale_grad(grad, tokens, cu_seqlens, token_table, scale)
    dtokens, dpositions = (
        scatter_sum(grad, index, len(table), table.dtype, factor)
        for index, table, factor in ((tokens, token_table, factors), (positions, position_table, None))
    )
    for table in (dtokens, dpositions):
        table[PAD] = 0  # as padding_idx has it
    return None, None, None, dtokens, dpositions, dgain, dbias, None, dscale, None


def _scale_grad(grad, tokens, cu_seqlens, token_table, scale):
    """Per sequence, the inner product of its rows' gradients and embeddings. Only who passes `scale` pays for it."""
    along = (grad * token_table[tokens].float()).sum(1).masked_fill(tokens == MASK, 0.0)
    owner = (
        torch.searchsorted(cu_seqlens, torch.arange(len(tokens), dtype=torch.int64, device=grad.device), right=True) - 1
    )
    return scatter_sum(along[:, None], owner, len(scale), scale.dtype)[:, 0]


@implements("embedding", backward=_backward, train=_train)
def embedding(*arguments):
    """See `esm_fast.ops.embedding`."""
    return _train(*arguments)[0]


def compile_specs(capability: int) -> list:
    """ESM-1b's width, in every dtype, as ESM-1b and ESM-1v have it."""
    count = [
        spec(
            token_factors,
            f"*i32 *i32 *{NAMES[dtype]} *fp32",
            dict(GIVEN=given),
            _COUNT,
            direction="fwd",
            dtype=dtype,
        )
        for dtype, given in [(torch.float32, False), *((dtype, True) for dtype in NAMES)]
    ]
    rows = [
        spec(
            embed_rows,
            f"*i32 *i32 *fp32 *{name} *{name} *{name} *{name} *fp32 fp32",
            dict(WIDTH=1280, BLOCK=padded(1280), DROPOUT=dropout, NORM=norm),
            _EMBED,
            direction="fwd",
            dtype=dtype,
        )
        for dtype, name in NAMES.items()
        for dropout, norm in ((True, True), (True, False))
    ]
    return count + rows
