"""`masked_lm_head` on the CPU; in training with a backward of its own, on the selected rows alone."""

import torch

from esm_fast import _C
from esm_fast.ops.registry import Request, implements

from .common import BACKEND, empty, follow_torch, require_one_dtype, stream_of, unproven, vectors_of, why_not
from .weights import plain_matrix, prepacked, product_of_rows


def head_yields(request: Request) -> list[str]:
    """Few rows and many weights, packed anew in each call: see docs/cpu.md."""
    return ["only by name with gradients: no faster than torch for few rows"] * request.grad + unproven(request)


def _chosen_rows(x, rows):
    """Their numbers, or None for all: negative numbers and masks mean what they mean to torch."""
    return None if rows is None else torch.arange(len(x), dtype=torch.int64, device="cpu")[rows]


def _checked_targets(targets, count):
    """As the kernels read them."""
    if targets is None:
        return None
    if targets.shape != (count,):
        raise ValueError(f"targets must be one for each of the {count} rows, not {tuple(targets.shape)}")
    return targets.long().contiguous()


def _no_loss() -> torch.Tensor:
    """Of no rows too, for which the kernels write none."""
    return torch.zeros((), dtype=torch.float32, device="cpu")


def _weights(dense, dense_bias, gain, ln_bias, table, bias, eps) -> dict:
    """As the kernels of training take them."""
    follow_torch()
    require_one_dtype(dense, table)
    dense_bias, gain, ln_bias, bias = vectors_of(dense, dense_bias, gain, ln_bias, bias)
    matrices = dict(dense_weight=plain_matrix(dense), token_table=plain_matrix(table))
    return dict(eps=eps, dense_bias=dense_bias, ln_weight=gain, ln_bias=ln_bias, bias=bias, **matrices)


def train(x, *weights_and_more):
    """(logits, loss), and for the backward pass the rows, what GELU is given and softmax_minus_onehot."""
    *weights, rows, targets, eps = weights_and_more
    chosen, dtype, tokens = _chosen_rows(x, rows), weights[0].dtype, len(weights[4])
    selected = stream_of(x) if chosen is None else stream_of(x).index_select(0, chosen)
    count = len(selected)
    targets = _checked_targets(targets, count)
    middle, logits = empty(*selected.shape, dtype=dtype), empty(count, tokens, dtype=dtype)
    softmax_minus_onehot, loss = (None, None) if targets is None else (empty(count, tokens), _no_loss())
    _C.masked_lm_head_train(
        x=selected,
        targets=targets,
        **_weights(*weights, eps),
        middle=middle,
        softmax_minus_onehot=softmax_minus_onehot,
        logits=logits,
        loss=loss,
    )
    return (logits, loss), (selected.to(dtype), middle, softmax_minus_onehot)


def backward(arguments, kept, grad_outputs):
    x, *weights, rows, _, eps = arguments
    dlogits, dloss = grad_outputs
    selected, middle, softmax_minus_onehot = (*kept, None)[:3]
    dense, table = weights[0], weights[4]
    (count, width), tokens = middle.shape, len(table)
    dselected, dvectors = empty(count, width), empty(3 * width + tokens)
    normed, dmiddle, dscores = (
        torch.empty_like(middle),
        torch.empty_like(middle),
        empty(count, tokens, dtype=dense.dtype),
    )
    _C.masked_lm_head_backward(
        **_weights(*weights, eps),
        middle=middle,
        softmax_minus_onehot=softmax_minus_onehot,
        dloss=0.0 if dloss is None else float(dloss),
        dlogits=dlogits.contiguous(),
        dx=dselected,
        dvectors=dvectors,
        normed=normed,
        dmiddle=dmiddle,
        dscores=dscores,
    )
    dgain, dln_bias, ddense_bias, dbias = dvectors.split([width, width, width, tokens])
    chosen = _chosen_rows(x, rows)
    dx = dselected if chosen is None else torch.zeros_like(x, dtype=torch.float32).index_add_(0, chosen, dselected)
    ddense = product_of_rows(dmiddle, selected) if dense.requires_grad else None
    dtable = product_of_rows(dscores, normed) if table.requires_grad else None
    gradients = (dx, ddense, ddense_bias, dgain, dln_bias, dtable, dbias)
    found = zip(gradients, arguments[:7], strict=True)
    return *(None if g is None else g.to(v.dtype) for g, v in found), None, None, None


@implements("masked_lm_head", backend=BACKEND, why_not=why_not, yields=head_yields, train=train, backward=backward)
def masked_lm_head(x, dense_weight, dense_bias, ln_weight, ln_bias, token_table, bias, rows, targets, eps):
    """See `esm_fast.ops.masked_lm_head`."""
    follow_torch()
    require_one_dtype(dense_weight, token_table)
    chosen = _chosen_rows(x, rows)
    wanted = len(x) if chosen is None else len(chosen)
    targets = _checked_targets(targets, wanted)
    dense_bias, gain, ln_bias, bias = vectors_of(dense_weight, dense_bias, ln_weight, ln_bias, bias)
    logits, loss = empty(wanted, len(token_table), dtype=gain.dtype), None if targets is None else _no_loss()
    dense, table = prepacked(dense_weight, token_table)
    _C.masked_lm_head(
        x=stream_of(x),
        rows=chosen,
        targets=targets,
        eps=eps,
        dense=dense,
        dense_bias=dense_bias,
        ln_weight=gain,
        ln_bias=ln_bias,
        table=table,
        bias=bias,
        logits=logits,
        loss=loss,
    )
    return logits, loss
