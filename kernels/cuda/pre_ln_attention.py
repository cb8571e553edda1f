"""pre_ln_attention: the norm and the attention are kernels here, the products cuBLAS's through torch.

Training keeps q, k, v, the attention's output and its log-sum-exp; the normed stream is made again.
"""

from collections import namedtuple

import torch

from esm_fast.ops.pre_ln_attention import pre_ln_attention as op

from .attention_varlen import attend, attend_backward, why_not
from .common import implements, of_dtype, require_one_dtype
from .layer_norm import layer_norm, layer_norm_grads
from .sums import column_sums

# The op's arguments by name, and in `_backward` their gradients.
Arguments = namedtuple("Arguments", op.signature.parameters, defaults=[None] * len(op.signature.parameters))
_VECTORS = ("ln_weight", "ln_bias", "q_bias", "k_bias", "v_bias", "out_bias")


def _prepared(values) -> Arguments:
    """The arguments as the kernels read them."""
    given = Arguments(*values)
    require_one_dtype(given.q_weight, given.k_weight, given.v_weight, given.out_weight)
    vectors = of_dtype(given.q_weight.dtype, *(getattr(given, name) for name in _VECTORS))
    (x,) = of_dtype(torch.float32, given.x)
    given = given._replace(**dict(zip(_VECTORS, vectors, strict=True)))
    return given._replace(x=x, cu_seqlens=given.cu_seqlens.contiguous())


def _projected(given: Arguments, normed):
    """q, k and v as (n, heads, head_dim), before any rotation."""
    pairs = (given.q_weight, given.q_bias), (given.k_weight, given.k_bias), (given.v_weight, given.v_bias)
    return [torch.addmm(bias, normed, weight.T).view(len(normed), given.heads, -1) for weight, bias in pairs]


def _swapped(x, sign: int):
    """The halves of each head exchanged, the first one times the sign, the second times its opposite."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([sign * second, -sign * first], dim=-1)


def _rotated(x, tables):
    cos, sin = tables.float().unsqueeze(2)
    return (x.float() * cos + _swapped(x.float(), -1) * sin).to(x.dtype)


def _rotated_back(grad, tables):
    """By the transpose of the rotation's matrix."""
    cos, sin = tables.float().unsqueeze(2)
    return (grad.float() * cos + _swapped(grad.float() * sin, 1)).to(grad.dtype)


def _table_grads(pairs):
    """Of the cosines and sines, from (x before the rotation, gradient after it)."""
    pairs = [(x.float(), grad.float()) for x, grad in pairs]
    dcos = sum((x * grad).sum(1) for x, grad in pairs)
    dsin = sum((_swapped(x, -1) * grad).sum(1) for x, grad in pairs)
    return torch.stack([dcos, dsin])


def _sequences(given: Arguments, head_dim: int):
    return given.cu_seqlens, given.max_seqlen, head_dim**-0.5


def _train(*values):
    given = _prepared(values)
    normed, _ = layer_norm(given.x, given.ln_weight, given.ln_bias, given.eps)
    q, k, v = _projected(given, normed)
    if given.rotary is not None:
        q, k = _rotated(q, given.rotary), _rotated(k, given.rotary)
    mixed, lse = attend(q, k, v, *_sequences(given, q.shape[-1]))
    out = values[0] + torch.addmm(given.out_bias, mixed.view(given.x.shape), given.out_weight.T)
    return (out, q, k) if given.return_qk else out, (q, k, v, mixed, lse)


def _backward(values, kept, grad_outputs):
    given, (q, k, v, mixed, lse) = _prepared(values), kept
    stream_grad, *qk_grads = (grad.contiguous() for grad in grad_outputs)
    dtype = given.out_weight.dtype
    stream_grad = stream_grad.float()
    grad = stream_grad.to(dtype)
    dmixed = (grad @ given.out_weight).view(q.shape)
    dq, dk, dv = attend_backward(q, k, v, mixed, lse, dmixed, *_sequences(given, q.shape[-1]))
    if given.return_qk:
        dq, dk = dq + qk_grads[0], dk + qk_grads[1]
    normed, statistics = layer_norm(given.x, given.ln_weight, given.ln_bias, given.eps, keep_statistics=True)
    dtables = None
    if given.rotary is not None:
        if given.rotary.requires_grad:
            before = _projected(given, normed)
            dtables = _table_grads([(before[0], dq), (before[1], dk)]).to(given.rotary.dtype)
        dq, dk = _rotated_back(dq, given.rotary), _rotated_back(dk, given.rotary)
    dq, dk, dv = (d.reshape(grad.shape) for d in (dq, dk, dv))
    dnormed = (dq @ given.q_weight).addmm_(dk, given.k_weight).addmm_(dv, given.v_weight)
    dx, dgain, dbias = layer_norm_grads(given.x, given.ln_weight, dnormed, statistics, stream_grad)
    return Arguments(
        x=dx.to(values[0].dtype),
        ln_weight=dgain,
        ln_bias=dbias,
        q_weight=dq.T @ normed,
        q_bias=column_sums(dq.float(), dtype),
        k_weight=dk.T @ normed,
        k_bias=column_sums(dk.float(), dtype),
        v_weight=dv.T @ normed,
        v_bias=column_sums(dv.float(), dtype),
        out_weight=grad.T @ mixed.view(grad.shape),
        out_bias=column_sums(stream_grad, dtype),
        rotary=dtables,
    )


@implements("pre_ln_attention", backward=_backward, train=_train, why_not=why_not)
def pre_ln_attention(*values):
    """See `esm_fast.ops.pre_ln_attention`."""
    return _train(*values)[0]
