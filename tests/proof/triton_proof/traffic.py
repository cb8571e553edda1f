"""Bytes that a call moves: by Triton kernels as the sanitizer counted them, and by torch's own ops around them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton_proof import sanitizer

from esm_fast.ops import verify
from esm_fast.ops.attention_varlen import _case as attention_case
from esm_fast.ops.contact_map import _case as contact_case
from esm_fast.ops.embedding import _case as embedding_case
from esm_fast.ops.gelu_ffn import _case as ffn_case
from esm_fast.ops.masked_lm_head import _case as head_case
from esm_fast.ops.masked_softmax import _case as softmax_case
from esm_fast.ops.pack_rows import _case as rows_case
from esm_fast.ops.pack_rows import _padded as padded_rows
from esm_fast.ops.pool import _case as pool_case
from esm_fast.ops.pre_ln_attention import _case as layer_case
from esm_fast.ops.registry import Case, Kernel, Op, run_with_gradients

# Enough tokens for the width, as ESM-1b has them, that neither weights nor the edges of tiles are most of it; where the
# tests set no limit, little.
CASES = {
    "attention_varlen": attention_case("4_proteins", [128, 128, 100, 28], 2, 64),
    "contact_map": contact_case("2_proteins", [40, 20], 2, 32),
    "embedding": embedding_case("2_proteins", [60, 40], 64),
    "gelu_ffn": ffn_case("512_rows", 512, 128, 512),
    "masked_lm_head": head_case("256_rows", 256, 512),
    "masked_softmax": softmax_case("2_padded", [64, 40], 2),
    "pack_rows": rows_case("3_proteins", *padded_rows([60, 40, 50]), 128, packed=False),
    "pool": pool_case("2_proteins", [60, 40], 128),
    "pre_ln_attention": layer_case("4_proteins", [128] * 4, 2, 64),
    "unpack_rows": rows_case("3_proteins", *padded_rows([60, 40, 50]), 128, packed=True),
}


class Bytes(NamedTuple):
    """distinct: every address once per launch or torch op, what DRAM must move; requested: with every repetition, what
    L2 must serve; kernels: the Triton kernels that were launched."""

    distinct: int
    requested: int
    kernels: tuple[str, ...]


class _TorchTraffic(TorchDispatchMode):
    """Counts each torch op's tensors once; views and fresh memory cost nothing, nor do the interpreter's own copies."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if sanitizer.launching() or function.is_view:
            return result
        name = function.overloadpacket.__name__
        if "empty" not in name and name != "detach":
            self.bytes += _size(*_tensors([*args, *(kwargs or {}).values(), result]))
        return result


def _tensors(values) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for value in values:
        nested = value if isinstance(value, (tuple, list)) else (value,)
        found |= {id(t): t for t in nested if isinstance(t, torch.Tensor)}
    return list(found.values())


def measure(call: Callable[[], object]) -> Bytes:
    with sanitizer.recording() as launches, _TorchTraffic() as torch_ops:
        call()
    return Bytes(
        distinct=sum(launch.distinct for launch in launches) + torch_ops.bytes,
        requested=sum(launch.requested for launch in launches) + torch_ops.bytes,
        kernels=tuple(sorted({launch.kernel for launch in launches})),
    )


def of_case(op: Op, kernel: Kernel, case: Case, dtype: torch.dtype, direction: str) -> tuple[Bytes, int]:
    """What one case moves, and the least that must be."""
    arguments = verify.bound(op, case.build(dtype, "cpu", 0))
    if direction == "fwd":
        cost = op.cost(**arguments)
        return measure(lambda: kernel.forward(*arguments.values())), cost.bytes + cost.between
    leaves = [value.requires_grad_() for value in arguments.values() if verify.differentiable(value)]
    outputs = verify.outputs_of(run_with_gradients(op, kernel, tuple(arguments.values())))
    outputs = [output for output in outputs if output.requires_grad]
    seeds = [torch.ones_like(output) for output in outputs]
    moved = measure(lambda: torch.autograd.grad(outputs, leaves, seeds, allow_unused=True))
    least = LEAST_BACKWARD.get(op.name)
    return moved, least(**arguments) if least else sum(map(_size, [*leaves, *leaves, *seeds]))


def _size(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# The least a backward moves: what it needs is read and what it gives is written, once by every step that no tile can
# share with the next. A product, a norm's pass over whole rows and an attention's over whole sequences are such steps;
# casts, sums over rows, GELUs and additions are free, as each could be done in the step before or after.


def _attention(q, **_) -> int:
    """q, k, v, the output, its gradient and the log-sum-exp; dq, dk and dv."""
    return 8 * _size(q) + 4 * q.shape[0] * q.shape[1]


def _softmax(scores, lengths, **_) -> int:
    """The map and its gradient without padding, in fp32; all of the scores' gradient."""
    return 2 * 4 * scores.shape[1] * int(lengths.long().square().sum()) + _size(scores)


def _norm(n: int, width: int, half: int) -> int:
    """The stream, the normed rows' gradient and the stream's; that of what went in."""
    return n * width * (3 * 4 + half)


def _layer(x, q_weight, heads, **_) -> int:
    (n, width), half = x.shape, q_weight.element_size()
    stream, rows, weight = 4 * n * width, half * n * width, _size(q_weight)
    steps = (
        stream + rows,  # LN again
        stream + rows + weight,  # the output projection's weight
        stream + rows + weight,  # what went into it
        8 * rows + 4 * n * heads,  # attention
        4 * rows + 3 * weight,  # the weights of q, k and v
        4 * rows + 3 * weight,  # what went into them
        _norm(n, width, half),
    )
    return sum(steps)


def _ffn(x, fc1_weight, **_) -> int:
    (n, width), (hidden, _), half = x.shape, fc1_weight.shape, fc1_weight.element_size()
    stream, rows, wide, weight = 4 * n * width, half * n * width, half * n * hidden, _size(fc1_weight)
    steps = (
        stream + rows,  # LN again
        rows + stream + 2 * wide + 2 * weight,  # the hidden activation again, and its gradient
        stream + wide + weight,  # fc2's weight
        wide + rows + weight,  # fc1's weight
        wide + rows + weight,  # what went into fc1
        _norm(n, width, half),
    )
    return sum(steps)


def _lm_head(x, dense_weight, token_table, rows, **_) -> int:
    (n, width), half = x.shape, dense_weight.element_size()
    m = n if rows is None else len(rows)
    chosen, hidden, logits = m * width * x.element_size(), half * m * width, half * m * len(token_table)
    weight, table = _size(dense_weight), _size(token_table)
    steps = (
        chosen + weight + hidden,  # the dense layer again
        2 * logits + table + hidden,  # what went into the projection
        4 * hidden,  # through LN and GELU, the normed rows again
        logits + hidden + table,  # the table
        hidden + chosen + weight,  # the dense layer's weight
        hidden + weight + _size(x),  # what went into it
    )
    return sum(steps)


def _pack(padded, rows) -> int:
    """The gradient of what was packed; that of all that was padded."""
    return _size(padded) + len(rows) * padded.shape[1] * padded.element_size() + _size(rows)


def _unpack(packed, rows, size) -> int:
    """Of the padded gradient, what is chosen."""
    return 2 * _size(packed) + _size(rows)


LEAST_BACKWARD: dict[str, Callable[..., int]] = {
    "attention_varlen": _attention,
    "gelu_ffn": _ffn,
    "masked_lm_head": _lm_head,
    "masked_softmax": _softmax,
    "pack_rows": _pack,
    "pre_ln_attention": _layer,
    "unpack_rows": _unpack,
}
