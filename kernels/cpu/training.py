"""What training runs: `attention_varlen` and `gelu_ffn` with backwards of their own."""

import torch

from esm_fast import _C
from esm_fast.ops.registry import implements
from esm_fast.packed import NAMES, PackedWeight

from .common import BACKEND, follow_torch, require_one_dtype, stream_of, unproven, vectors_of, why_not


def _run(kernel, q, k, v, cu_seqlens, scale, log_sums, *tensors):
    follow_torch()
    q, k, v, ends = (tensor.detach().contiguous() for tensor in (q, k, v, cu_seqlens))
    rows, heads, head_dim = q.shape
    kernel(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        NAMES[q.dtype],
        rows,
        ends.data_ptr(),
        len(ends) - 1,
        heads,
        head_dim,
        scale,
        0 if log_sums is None else log_sums.data_ptr(),
        *(tensor.data_ptr() for tensor in tensors),
    )


def _train(q, k, v, cu_seqlens, max_seqlen, scale):
    out, log_sums = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[1], len(q))
    _run(_C.attention_varlen, q, k, v, cu_seqlens, scale, log_sums, out)
    return out, (out, log_sums)


def _backward(arguments, kept, grad_outputs):
    q, k, v, cu_seqlens, _, scale = arguments
    out, log_sums = kept
    grads = [torch.empty(q.shape, dtype=q.dtype) for _ in range(3)]
    _run(_C.attention_backward, q, k, v, cu_seqlens, scale, log_sums, out, grad_outputs[0].contiguous(), *grads)
    return *grads, None, None, None


@implements("attention_varlen", backend=BACKEND, why_not=why_not, yields=unproven, train=_train, backward=_backward)
def attention_varlen(q, k, v, cu_seqlens, max_seqlen, scale):
    """See `esm_fast.ops.attention_varlen`."""
    out = torch.empty(q.shape, dtype=q.dtype)
    _run(_C.attention_varlen, q, k, v, cu_seqlens, scale, None, out)
    return out


def plain_matrix(weight):
    """As the training kernels read it: plain, because they pack it for each call."""
    if hasattr(weight, "linear"):
        raise RuntimeError("8-bit weights have no gradients; load the model with another dtype")
    return weight.unpack() if isinstance(weight, PackedWeight) else weight.detach().contiguous()


def filled_up(rows: int) -> int:
    """To a number of five binary digits: there are 16 from one power of two to the next, and none below 64."""
    unit = max(64, 1 << rows.bit_length() >> 5)
    return -(-rows // unit) * unit


def product_of_rows(a, b):
    """a.T @ b. In bf16 zeros fill the rows up, because oneDNN makes code for every number of them and keeps it."""
    missing = filled_up(len(a)) - len(a)
    if missing and a.dtype != torch.float32:
        a, b = (torch.nn.functional.pad(matrix, (0, 0, 0, missing)) for matrix in (a, b))
    return a.T @ b


def _ffn(kernel, x, weights, eps, middle, *tensors):
    follow_torch()
    gain, ln_bias, fc1, bias1, fc2, bias2 = weights
    require_one_dtype(fc1, fc2)
    gain, ln_bias, bias1, bias2 = vectors_of(fc1, gain, ln_bias, bias1, bias2)
    fc1, fc2 = plain_matrix(fc1), plain_matrix(fc2)
    addresses = [tensor.data_ptr() for tensor in (gain, ln_bias, fc1, bias1, fc2, bias2)]
    kernel(
        x.data_ptr(),
        len(x),
        *fc1.T.shape,
        eps,
        NAMES[fc1.dtype],
        addresses,
        middle.data_ptr(),
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
    )


def ffn_train(x, *weights_and_eps):
    """`gelu_ffn`, and what GELU is given, for the backward pass."""
    *weights, eps = weights_and_eps
    stream, fc1 = stream_of(x), weights[2]
    result, middle = torch.empty_like(stream), torch.empty(len(x), len(fc1), dtype=fc1.dtype)
    _ffn(_C.ffn_training, stream, weights, eps, middle, result)
    return result.to(x.dtype), (middle,)


def ffn_backward(arguments, kept, grad_outputs):
    x, *weights, eps = arguments
    stream, dout, (middle,) = stream_of(x), stream_of(grad_outputs[0]), kept
    fc1, fc2 = weights[2], weights[4]
    hidden, width = fc1.shape
    dx, dvectors = torch.empty_like(stream), torch.empty(3 * width + hidden)
    normed = torch.empty(x.shape, dtype=fc1.dtype)
    dmiddle, activated = torch.empty_like(middle), torch.empty_like(middle)
    dresult = None if fc1.dtype == dout.dtype else torch.empty_like(normed)
    _ffn(_C.ffn_backward, stream, weights, eps, middle, dout, dx, dvectors, normed, dmiddle, activated, dresult)
    dgain, dln_bias, dbias2, dbias1 = dvectors.split([width, width, width, hidden])
    dresult = dout if dresult is None else dresult
    dfc1 = product_of_rows(dmiddle, normed) if fc1.requires_grad else None
    dfc2 = product_of_rows(dresult, activated) if fc2.requires_grad else None
    gradients = (dx, dgain, dln_bias, dfc1, dbias1, dfc2, dbias2)
    return *(None if g is None else g.to(v.dtype) for g, v in zip(gradients, arguments[:-1], strict=True)), None
