"""What surrounds the layers: `embedding`, `masked_lm_head`, `masked_softmax`, `pool`."""

import torch

from esm_fast import _C
from esm_fast.alphabet import MASK
from esm_fast.ops.embedding import KEPT_IN_TRAINING, added
from esm_fast.ops.registry import implements
from esm_fast.packed import NAMES

from .common import BACKEND, follow_torch, packed, require_one_dtype, stream_of, vectors_of, why_not, yields
from .head import checked_targets, chosen_rows, head_backward, head_train, head_yields


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@implements("embedding", backend=BACKEND, why_not=why_not, yields=yields)
def embedding(
    tokens, positions, cu_seqlens, token_table, position_table, ln_weight, ln_bias, token_dropout, scale, eps
):
    """See `esm_fast.ops.embedding`."""
    follow_torch()
    positions, position_table = added(positions, token_table, position_table)
    require_one_dtype(token_table, position_table)
    if scale is not None and scale.shape != (len(cu_seqlens) - 1,):
        raise ValueError(f"scale must be (sequences,), ({len(cu_seqlens) - 1},) here, not {tuple(scale.shape)}")
    tables = token_table.detach().contiguous(), position_table.detach().contiguous()
    tokens, positions, ends = tokens.long().contiguous(), positions.long().contiguous(), cu_seqlens.contiguous()
    gain, bias = (None, None) if ln_weight is None else vectors_of(token_table, ln_weight, ln_bias)
    scale = None if scale is None else stream_of(scale)
    result = torch.empty(len(tokens), token_table.shape[1])
    _C.embedding(
        tokens.data_ptr(),
        positions.data_ptr(),
        ends.data_ptr(),
        len(tokens),
        len(ends) - 1,
        tables[0].data_ptr(),
        len(token_table),
        tables[1].data_ptr(),
        len(position_table),
        _address(gain),
        _address(bias),
        NAMES[token_table.dtype],
        token_table.shape[1],
        token_dropout,
        MASK,
        KEPT_IN_TRAINING,
        _address(scale),
        eps,
        result.data_ptr(),
    )
    return result


@implements(
    "masked_lm_head", backend=BACKEND, why_not=why_not, yields=head_yields, train=head_train, backward=head_backward
)
def masked_lm_head(x, dense_weight, dense_bias, ln_weight, ln_bias, token_table, bias, rows, targets, eps):
    """See `esm_fast.ops.masked_lm_head`."""
    follow_torch()
    require_one_dtype(dense_weight, token_table)
    stream, rows = stream_of(x), chosen_rows(x, rows)
    wanted = len(x) if rows is None else len(rows)
    targets = checked_targets(targets, wanted)
    logits = dense_weight.new_empty(wanted, len(token_table), requires_grad=False)
    loss = None if targets is None else torch.zeros(())  # of no rows too, whose targets have no address
    dense_bias, gain, ln_bias, bias = vectors_of(dense_weight, dense_bias, ln_weight, ln_bias, bias)
    _C.masked_lm_head(
        stream.data_ptr(),
        len(x),
        _address(rows),
        wanted,
        _address(targets),
        eps,
        packed(dense_weight),
        dense_bias.data_ptr(),
        gain.data_ptr(),
        ln_bias.data_ptr(),
        packed(token_table),
        bias.data_ptr(),
        logits.data_ptr(),
        _address(loss),
    )
    return logits, loss


@implements("masked_softmax", backend=BACKEND, why_not=why_not, yields=yields)
def masked_softmax(scores, lengths):
    """See `esm_fast.ops.masked_softmax`."""
    follow_torch()
    scores, lengths = scores.detach().contiguous(), lengths.long().contiguous()
    result = torch.empty(scores.shape)
    batch, heads, size, _ = scores.shape
    dtype = NAMES[scores.dtype]
    _C.masked_softmax(scores.data_ptr(), dtype, lengths.data_ptr(), batch, heads, size, result.data_ptr())
    return result


@implements("pool", backend=BACKEND, why_not=why_not, yields=yields)
def pool(x, cu_seqlens, weight):
    """See `esm_fast.ops.pool`."""
    follow_torch()
    stream, weight, ends = stream_of(x), stream_of(weight), cu_seqlens.contiguous()
    result = torch.empty(len(ends) - 1, x.shape[1])
    _C.pool(stream.data_ptr(), *x.shape, ends.data_ptr(), len(result), weight.data_ptr(), result.data_ptr())
    return result
