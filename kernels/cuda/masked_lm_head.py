"""masked_lm_head: GELU, norm and loss are kernels here, the products cuBLAS's through torch."""

import torch

from .bias_gelu import bias_gelu, bias_gelu_grads
from .common import ceil_div, implements, launch, of_dtype, require_one_dtype
from .layer_norm import layer_norm, layer_norm_grads
from .sums import column_sums, scatter_sum

_ROWS = 64  # cross_entropy.cu
_SHARED = 48 << 10  # bytes a block has without asking for more
_MOST_TOKENS = _SHARED // 4 // _ROWS


def cross_entropy(logits, targets) -> torch.Tensor:
    """The sum over the rows, fp32 ()."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    launch("cross_entropy", "forward", logits.dtype, *_grid(logits), logits, targets, losses, *logits.shape,
           shared=_shared(logits))  # fmt: skip
    return losses.sum()


def cross_entropy_grads(logits, targets, dloss, along=None) -> torch.Tensor:
    """dlogits: of the loss, plus `along`, the logits' own."""
    dlogits = torch.empty_like(logits)
    tensors = logits, targets, dloss, along, dlogits
    launch("cross_entropy", "backward", logits.dtype, *_grid(logits), *tensors, *logits.shape,
           shared=_shared(logits))  # fmt: skip
    return dlogits


def _grid(logits) -> tuple[int, int]:
    return ceil_div(len(logits), _ROWS), _ROWS


def _shared(logits) -> int:
    if logits.shape[1] > _MOST_TOKENS:
        raise ValueError(f"the CUDA loss takes up to {_MOST_TOKENS} tokens, this vocabulary has {logits.shape[1]}")
    return _ROWS * logits.shape[1] * 4


def _prepared(x, dense_weight, token_table, rows, targets, *vectors):
    require_one_dtype(dense_weight, token_table)
    chosen = (x if rows is None else x[rows]).to(dense_weight.dtype).contiguous()
    return chosen, *of_dtype(torch.int64, targets), *of_dtype(dense_weight.dtype, *vectors)


def _backward(arguments, kept, grad_outputs):
    x, dense_weight, dense_bias, gain, ln_bias, token_table, bias, rows, targets, eps = arguments
    prepared = _prepared(x, dense_weight, token_table, rows, targets, dense_bias, gain, ln_bias)
    chosen, targets, dense_bias, gain, ln_bias = prepared
    grad_logits, grad_loss = grad_outputs
    dlogits = grad_logits.contiguous()
    if targets is not None:
        dlogits = cross_entropy_grads(kept[0], targets, grad_loss.float().reshape(1), dlogits)

    h = chosen @ dense_weight.T
    hidden = bias_gelu(h, dense_bias)
    normed, statistics = layer_norm(hidden, gain, ln_bias, eps, keep_statistics=True)
    dhidden, dgain, dln_bias = layer_norm_grads(hidden, gain, dlogits @ token_table, statistics)
    dh, ddense_bias = bias_gelu_grads(h, dense_bias, dhidden)
    dx = dh @ dense_weight
    dx = dx.to(x.dtype) if rows is None else scatter_sum(dx.float(), rows, len(x), x.dtype)
    dbias = column_sums(dlogits.float(), bias.dtype)
    return dx, dh.T @ chosen, ddense_bias, dgain, dln_bias, dlogits.T @ normed, dbias, None, None, None


@implements("masked_lm_head", backward=_backward)
def masked_lm_head(x, dense_weight, dense_bias, ln_weight, ln_bias, token_table, bias, rows, targets, eps):
    """See `esm_fast.ops.masked_lm_head`."""
    prepared = _prepared(x, dense_weight, token_table, rows, targets, dense_bias, ln_weight, ln_bias, bias)
    chosen, targets, dense_bias, gain, ln_bias, bias = prepared
    hidden = bias_gelu(chosen @ dense_weight.T, dense_bias)
    normed, _ = layer_norm(hidden, gain, ln_bias, eps)
    logits = torch.addmm(bias, normed, token_table.T)
    return logits, None if targets is None else cross_entropy(logits, targets)
