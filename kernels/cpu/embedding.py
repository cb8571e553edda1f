"""`embedding` on the CPU."""

from esm_fast import _C
from esm_fast.alphabet import MASK
from esm_fast.ops.embedding import KEPT_IN_TRAINING, added
from esm_fast.ops.registry import implements

from .common import BACKEND, empty, follow_torch, require_one_dtype, stream_of, vectors_of, why_not, yields


@implements("embedding", backend=BACKEND, why_not=why_not, yields=yields)
def embedding(
    tokens, positions, cu_seqlens, token_table, position_table, ln_weight, ln_bias, token_dropout, scale, eps
):
    """See `esm_fast.ops.embedding`."""
    follow_torch()
    positions, position_table = added(positions, token_table, position_table)
    require_one_dtype(token_table, position_table)
    gain, bias = (None, None) if ln_weight is None else vectors_of(token_table, ln_weight, ln_bias)
    result = empty(len(tokens), token_table.shape[1])
    _C.embedding(
        tokens=tokens.long().contiguous(),
        positions=positions.long().contiguous(),
        cu_seqlens=cu_seqlens.contiguous(),
        token_table=token_table.detach().contiguous(),
        position_table=position_table.detach().contiguous(),
        ln_weight=gain,
        ln_bias=bias,
        token_dropout=token_dropout,
        mask=MASK,
        kept=KEPT_IN_TRAINING,
        scale=None if scale is None else stream_of(scale),
        eps=eps,
        result=result,
    )
    return result
