"""A CPU implementation of torch's operators of memory-efficient and flash attention, which have none: for tests without
a GPU.

It refuses what torch's CUDA code refuses, computes the forward by the textbook formula, and the backward from the
log-sum-exp and the output it is handed, as the CUDA kernel does: a caller that hands over the wrong ones gets wrong
gradients. Memory that the kernel leaves uninitialised is NaN here.
"""

from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import library

from esm_fast.ops import OPS, registry

ALIGNMENT = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 4}


@contextmanager
def installed(log: list):
    """Within, aten's operators run on CPU tensors, and every call is noted in the log by the operator's name."""

    def noted(name, compute):
        def call(*arguments, **options):
            log.append(name)
            return compute(*arguments, **options)

        return call

    with library._scoped_library("aten", "IMPL") as aten:
        aten.impl("_efficient_attention_forward", noted("forward", _forward), "CPU")
        aten.impl("_efficient_attention_backward", noted("backward", _backward), "CPU")
        aten.impl("_flash_attention_forward", noted("forward", _flash_forward), "CPU")
        aten.impl("_flash_attention_backward", noted("backward", _flash_backward), "CPU")
        yield log


@contextmanager
def admitted(backend: str, devices=("cpu",)):
    """Within, the backend's kernels take tensors on other devices as if these were a GPU of compute capability 8.0."""
    before = {name: registry.kernels(name) for name in OPS}

    def as_gpu(function):
        return lambda request: function(
            request._replace(device="cuda", arch=(8, 0)) if request.device in devices else request
        )

    for name in OPS:
        registry._KERNELS[name] = [
            replace(kernel, why_not=as_gpu(kernel.why_not)) if kernel.backend == backend else kernel
            for kernel in before[name]
        ]
    try:
        yield
    finally:
        registry._KERNELS.update(before)


def _check(q, k, v, bias, ends_q, ends_k, longest_q, longest_k, dropout, mask, seqlen_k=None, window_size=None):
    assert bias is None and dropout == 0.0 and mask == 0 and seqlen_k is None and window_size is None
    assert q.dim() == 4 and q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    assert q.shape[0] == 1, "offsets go with one batch"
    for ends in (ends_q, ends_k):
        assert ends.dtype == torch.int32 and ends.dim() == 1 and ends.is_contiguous()
    assert torch.equal(ends_q, ends_k) and ends_q[0] == 0 and ends_q[-1] == q.shape[1]
    assert 0 < longest_q == longest_k <= q.shape[1]
    for tensor in (q, k, v):
        assert tensor.stride(-1) == 1 and tensor.stride(2) % ALIGNMENT[q.dtype] == 0
        assert tensor.data_ptr() % 16 == 0


def _spans(ends):
    return list(zip(ends.tolist(), ends.tolist()[1:], strict=False))


def _forward(
    q, k, v, bias, ends_q, ends_k, longest_q, longest_k, dropout, mask, compute_log_sumexp=False,
    *, scale=None, **options,
):  # fmt: skip
    _check(q, k, v, bias, ends_q, ends_k, longest_q, longest_k, dropout, mask, **options)
    heads = q.shape[2]
    out = torch.full_like(q, float("nan"))
    width = -(-longest_q // 32) * 32 if compute_log_sumexp else 0
    lse = torch.full((len(ends_q) - 1, heads, width), float("nan"))
    for i, (start, end) in enumerate(_spans(ends_q)):
        end = min(end, start + longest_q)  # no block of the grid computes what lies beyond
        queries, keys, values = (t[0, start:end].float().transpose(0, 1) for t in (q, k, v))
        scores = scale * queries @ keys.transpose(1, 2)
        out[0, start:end] = (scores.softmax(-1).to(q.dtype).float() @ values).transpose(0, 1).to(q.dtype)
        if compute_log_sumexp:
            lse[i, :, : end - start] = scores.logsumexp(-1)
            lse[i, :, end - start : -(-(end - start) // 32) * 32] = float("inf")
    return out, lse, torch.empty((), dtype=torch.long), torch.empty((), dtype=torch.long), longest_q, longest_k


def _backward(
    grad, q, k, v, bias, out, ends_q, ends_k, longest_q, longest_k, lse, dropout, seed, offset, mask,
    bias_requires_grad, *, scale=None, num_splits_key=None, shared_storage_dqdkdv=False, **options,
):  # fmt: skip
    _check(q, k, v, bias, ends_q, ends_k, longest_q, longest_k, dropout, mask, **options)
    assert not bias_requires_grad and not shared_storage_dqdkdv
    assert grad.shape == out.shape == q.shape and grad.dtype == out.dtype == q.dtype
    assert all(tensor.data_ptr() % 16 == 0 for tensor in (grad, out))
    assert lse.dtype == torch.float32 and lse.shape[2] % 32 == 0 and lse.shape[2] >= longest_q
    grads = [torch.full_like(t, float("nan")) for t in (q, k, v)]
    for i, (start, end) in enumerate(_spans(ends_q)):
        queries, keys, values, result, above = (t[0, start:end].float().transpose(0, 1) for t in (q, k, v, out, grad))
        p = (scale * queries @ keys.transpose(1, 2) - lse[i, :, : end - start, None]).exp()
        delta = (above * result).sum(-1, keepdim=True)
        dscores = scale * p * (above @ values.transpose(1, 2) - delta)
        for whole, part in zip(grads, (dscores @ keys, dscores.transpose(1, 2) @ queries, p.transpose(1, 2) @ above),
                               strict=True):  # fmt: skip
            whole[0, start:end] = part.transpose(0, 1).to(q.dtype)
    return *grads, torch.empty(())


def _flash_check(q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, causal):
    assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention-2 has half types alone"
    assert q.dim() == 3 and q.shape[2] % 8 == 0 and not causal
    _check(q[None], k[None], v[None], None, ends_q, ends_k, longest_q, longest_k, dropout, 0)


def _flash_forward(q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, causal, debug, *, scale=None, **options):
    """The log-sum-exp is (heads, rows), as FlashAttention-2 has it for packed sequences."""
    assert not debug and not any(value is not None for value in options.values())
    _flash_check(q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, causal)
    given = (q[None], k[None], v[None], None, ends_q, ends_k, longest_q, longest_k, 0.0, 0, True)
    out, padded, *_ = _forward(*given, scale=scale)
    lse = torch.full((q.shape[1], len(q)), float("nan"))
    for i, (start, end) in enumerate(_spans(ends_q)):
        lse[:, start:end] = padded[i, :, : end - start]
    return out[0], lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def _flash_backward(
    grad, q, k, v, out, lse, ends_q, ends_k, longest_q, longest_k, dropout, causal, seed, unused,
    *, scale=None, **options,
):  # fmt: skip
    assert torch.are_deterministic_algorithms_enabled(), "dq would be summed in no fixed order"
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    _flash_check(q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, causal)
    assert lse.shape == (q.shape[1], len(q)) and seed.dtype == torch.uint64
    padded = torch.zeros(len(ends_q) - 1, q.shape[1], -(-longest_q // 32) * 32)
    for i, (start, end) in enumerate(_spans(ends_q)):
        padded[i, :, : end - start] = lse[:, start:end]
    given = (grad[None], q[None], k[None], v[None], None, out[None], ends_q, ends_k, longest_q, longest_k, padded)
    dq, dk, dv, _ = _backward(*given, 0.0, None, None, 0, False, scale=scale)
    return dq[0], dk[0], dv[0]
