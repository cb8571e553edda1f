"""`masked_lm_head` in training: with a backward of its own, on the selected rows alone."""

import torch

from esm_fast import _C
from esm_fast.ops.registry import Request
from esm_fast.packed import NAMES

from .common import follow_torch, require_one_dtype, stream_of, unproven, vectors_of
from .training import plain_matrix, product_of_rows


def head_yields(request: Request) -> list[str]:
    """Few rows and many weights, packed anew in each call: see docs/cpu.md."""
    return ["only by name with gradients: no faster than torch for few rows"] * request.grad + unproven(request)


def chosen_rows(x, rows):
    """Their numbers, or None for all: negative numbers and masks mean what they mean to torch."""
    return None if rows is None else torch.arange(len(x))[rows]


def checked_targets(targets, count):
    """As the kernels read them."""
    if targets is None:
        return None
    if targets.shape != (count,):
        raise ValueError(f"targets must be one for each of the {count} rows, not {tuple(targets.shape)}")
    return targets.long().contiguous()


def _run(kernel, before, count, weights, eps, *tensors):
    follow_torch()
    dense, dense_bias, gain, ln_bias, table, bias = weights
    require_one_dtype(dense, table)
    dense_bias, gain, ln_bias, bias = vectors_of(dense, dense_bias, gain, ln_bias, bias)
    dense, table = plain_matrix(dense), plain_matrix(table)
    kernel(
        *before,
        count,
        dense.shape[0],
        table.shape[0],
        eps,
        NAMES[dense.dtype],
        [tensor.data_ptr() for tensor in (dense, dense_bias, gain, ln_bias, table, bias)],
        *(_argument(value) for value in tensors),
    )


def _argument(value):
    if value is None:
        return 0
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def head_train(x, *weights_and_more):
    """(logits, loss), and for the backward pass the rows, what GELU is given and softmax less the one-hot targets."""
    *weights, rows, targets, eps = weights_and_more
    chosen, dtype, tokens = chosen_rows(x, rows), weights[0].dtype, len(weights[4])
    selected = stream_of(x) if chosen is None else stream_of(x).index_select(0, chosen)
    count = len(selected)
    targets = checked_targets(targets, count)
    middle, logits = torch.empty(selected.shape, dtype=dtype), torch.empty(count, tokens, dtype=dtype)
    wrong, loss = (None, None) if targets is None else (torch.empty(count, tokens), torch.zeros(()))
    _run(_C.head_training, [selected.data_ptr()], count, weights, eps, targets, middle, wrong, logits, loss)
    return (logits, loss), (selected.to(dtype), middle, wrong)


def head_backward(arguments, kept, grad_outputs):
    x, *weights, rows, _, eps = arguments
    dlogits, dloss = grad_outputs
    selected, middle, wrong = (*kept, None)[:3]
    dense, table = weights[0], weights[4]
    (count, width), tokens = middle.shape, len(table)
    dselected, dvectors = torch.empty(count, width), torch.empty(3 * width + tokens)
    normed, dmiddle, dscores = torch.empty_like(middle), torch.empty_like(middle), torch.empty_like(dlogits)
    dloss = 0.0 if dloss is None else float(dloss)
    outgoing = dselected, dvectors, normed, dmiddle, dscores
    _run(_C.head_backward, [], count, weights, eps, middle, wrong, dloss, dlogits.contiguous(), *outgoing)
    dgain, dln_bias, ddense_bias, dbias = dvectors.split([width, width, width, tokens])
    chosen = chosen_rows(x, rows)
    dx = dselected if chosen is None else torch.zeros(x.shape).index_add_(0, chosen, dselected)
    ddense = product_of_rows(dmiddle, selected) if dense.requires_grad else None
    dtable = product_of_rows(dscores, normed) if table.requires_grad else None
    gradients = (dx, ddense, ddense_bias, dgain, dln_bias, dtable, dbias)
    found = zip(gradients, arguments[:7], strict=True)
    return *(None if g is None else g.to(v.dtype) for g, v in found), None, None, None
