"""masked_softmax: padded scores to attention maps."""

import torch

from .common import implements, launch, row_grid


def _backward(arguments, kept, grad_outputs):
    scores, lengths = arguments
    weights, grad = kept[0], grad_outputs[0].contiguous()
    dscores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    batch, heads, size, _ = scores.shape
    rows = batch * heads * size
    launch(
        "masked_softmax", "backward", scores.dtype, *row_grid(rows),
        weights, grad, lengths.int().contiguous(), dscores, rows, heads, size,
    )  # fmt: skip
    return dscores, None


@implements("masked_softmax", backward=_backward)
def masked_softmax(scores, lengths):
    """See `esm_fast.ops.masked_softmax`."""
    batch, heads, size, _ = scores.shape
    weights = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    rows = batch * heads * size
    scores, lengths = scores.contiguous(), lengths.int().contiguous()
    launch("masked_softmax", "forward", scores.dtype, *row_grid(rows), scores, lengths, weights, rows, heads, size)
    return weights
