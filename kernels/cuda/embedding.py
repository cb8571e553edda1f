"""embedding: both tables, the token-dropout scale and the norm in one pass over the rows."""

import torch

from esm_fast.alphabet import MASK, PAD
from esm_fast.ops.embedding import KEPT_IN_TRAINING, added

from .common import implements, launch, of_dtype, require_one_dtype, row_grid
from .layer_norm import layer_norm, layer_norm_grads
from .sums import scatter_sum

_ROWS_EACH = 8  # of a warp: a block reads the norm's gain and bias once


def _factors(tokens, cu_seqlens, token_dropout, scale):
    """(n,) what multiplies each token's embedding, or None for 1."""
    if not token_dropout:
        return None
    factors = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    sequences = len(cu_seqlens) - 1
    tensors = tokens, cu_seqlens.contiguous(), scale, factors
    launch(
        "embedding", "factors", torch.float32, *row_grid(sequences), *tensors, sequences, MASK, KEPT_IN_TRAINING
    )  # fmt: skip
    return factors


def _rows(tokens, positions, factors, tables, norm, eps):
    rows, width = len(tokens), tables[0].shape[1]
    out = torch.empty(rows, width, dtype=torch.float32, device=tokens.device)
    tensors = tokens, positions, factors, *tables, *norm, out
    launch("embedding", "forward", tables[0].dtype, *row_grid(rows, _ROWS_EACH), *tensors, rows, width, eps)
    return out


def _prepared(tokens, positions, cu_seqlens, token_table, position_table, token_dropout, scale):
    """(tokens, positions, factors, tables) as the kernels read them."""
    positions, position_table = added(positions, token_table, position_table)
    require_one_dtype(token_table, position_table)
    tokens, positions = of_dtype(torch.int32, tokens, positions)
    (scale,) = of_dtype(torch.float32, scale)
    factors = _factors(tokens, cu_seqlens, token_dropout, scale)
    return tokens, positions, factors, of_dtype(token_table.dtype, token_table, position_table)


def _backward(arguments, kept, grad_outputs):
    tokens, positions, cu_seqlens, token_table, position_table, gain, bias, token_dropout, scale, eps = arguments
    prepared = _prepared(tokens, positions, cu_seqlens, token_table, position_table, token_dropout, scale)
    tokens, positions, factors, tables = prepared
    grad, dgain, dbias = grad_outputs[0].contiguous(), None, None
    if gain is not None:
        x = _rows(tokens, positions, factors, tables, (None, None), eps)
        gain, bias = of_dtype(token_table.dtype, gain, bias)
        _, statistics = layer_norm(x, gain, bias, eps, keep_statistics=True)
        grad, dgain, dbias = layer_norm_grads(x, gain, grad, statistics)
    dtokens = scatter_sum(grad, tokens, len(token_table), token_table.dtype, factors)
    dpositions = scatter_sum(grad, positions, len(tables[1]), tables[1].dtype)
    for table in (dtokens, dpositions):
        table[PAD] = 0  # as padding_idx has it
    dscale = None
    if token_dropout and scale is not None:
        along = (grad * token_table[tokens].float()).sum(1, keepdim=True).masked_fill((tokens == MASK)[:, None], 0.0)
        owner = (
            torch.searchsorted(cu_seqlens, torch.arange(len(tokens), dtype=torch.int64, device=grad.device), right=True)
            - 1
        )
        dscale = scatter_sum(along, owner, len(scale), torch.float32)[:, 0].to(scale.dtype)
    return None, None, None, dtokens, dpositions, dgain, dbias, None, dscale, None


@implements("embedding", backward=_backward)
def embedding(
    tokens, positions, cu_seqlens, token_table, position_table, ln_weight, ln_bias, token_dropout, scale, eps
):
    """See `esm_fast.ops.embedding`."""
    prepared = _prepared(tokens, positions, cu_seqlens, token_table, position_table, token_dropout, scale)
    return _rows(*prepared, of_dtype(token_table.dtype, ln_weight, ln_bias), eps)
