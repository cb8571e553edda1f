"""What `_C` refuses: each tensor of each kernel's call, replaced by one that the kernel would read or write beyond its
end, is a ValueError. The calls are those that the ops make, recorded."""

import functools

import pytest
import torch
from cpu_levels import kernel
from torch.utils import _pytree as pytree

from esm_fast import _C
from esm_fast.ops import OPS, verify

KERNELS = ("attention_varlen", "contact_map", "embedding", "gelu_ffn", "masked_lm_head", "masked_softmax", "pool",
           "pool_max", "pool_moments", "pre_ln_attention", "transformer_stack")  # fmt: skip


class Recorder:
    """In the place of `_C` in a module of kernels/cpu: keeps the arguments of every call."""

    def __init__(self, calls):
        self._calls = calls

    def __getattr__(self, name):
        function = getattr(_C, name)
        if name not in vars(_C) or name in ("threads", "set_threads", "checksums"):
            return function

        def recorded(**arguments):
            self._calls.append((name, arguments))
            return function(**arguments)

        return recorded


def recorded_calls(op_name, monkeypatch, gradients):
    """(kernel, arguments) of every call of `_C` that an op makes for one of its cases."""
    import importlib

    calls = []
    for module in (op_name, "attention_varlen"):
        file = importlib.import_module(f"esm_fast.kernels.cpu.{module}")
        monkeypatch.setattr(file, "_C", Recorder(calls))
    op = OPS[op_name]
    cases = op.cases()
    case = next((c for c in cases if c.name in ("pooled", "rows_33", "masked_rows", "small")), None)
    case = case or next((c for c in cases if c.name == "tiny"), cases[-1])
    if gradients:
        verify.gradients(op, kernel(op_name), case, torch.float32, "cpu")
    else:
        verify.forward(op, kernel(op_name), case, torch.float32, "cpu")
    assert calls
    return calls


# Rows of these are looked up by numbers that the kernel checks, so that one fewer may do: see the test at the end.
LOOKED_UP = {("embedding", "token_table"), ("embedding", "position_table"), ("masked_lm_head", "x")}


def hostile(tensor, looked_up=False):
    """Tensors in its place that must not pass."""
    yield tensor.double() if tensor.dtype != torch.float64 else tensor.float()
    yield tensor.to("meta")
    yield tensor[None]
    yield torch.empty(0, dtype=tensor.dtype, device="cpu") if tensor.numel() else tensor.new_ones(3)
    if tensor.ndim and tensor.shape[0] > 1:
        if not looked_up:
            yield tensor[:-1]
        yield torch.cat([tensor, tensor[:1]])[torch.arange(len(tensor))].repeat_interleave(2, 0)[::2]  # strides
    yield tensor.to_sparse() if tensor.ndim and tensor.dtype == torch.float32 else tensor.to("meta")


def replaced(value, made):
    """The value with each of its tensors replaced, one at a time: tensors, and sequences of them, nested."""
    if isinstance(value, torch.Tensor):
        yield from made(value)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            for new in replaced(inner, made):
                yield type(value)([*value[:place], new, *value[place + 1 :]])


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("op_name", KERNELS)
def test_no_tensor_passes_that_a_kernel_would_leave(op_name, gradients, monkeypatch):
    tried = 0
    for name, arguments in recorded_calls(op_name, monkeypatch, gradients):
        getattr(_C, name)(**arguments)  # passes as it was
        for argument, value in arguments.items():
            made = functools.partial(hostile, looked_up=(name, argument) in LOOKED_UP)
            for wrong in replaced(value, made):
                with pytest.raises((ValueError, TypeError, IndexError)):
                    getattr(_C, name)(**arguments | {argument: wrong})
                tried += 1
    assert tried > 10


def test_matrices_of_another_shape_are_refused():
    weights = [_C.prepack([torch.ones(*shape)], "float32") for shape in ((64, 32), (32, 64), (32, 96), (48, 32))]
    vectors = dict(ln_weight=torch.ones(32), ln_bias=torch.ones(32), fc1_bias=torch.ones(64), fc2_bias=torch.ones(32))
    call = dict(x=torch.ones(3, 32), eps=1e-5, **vectors, result=torch.empty(3, 32))
    _C.gelu_ffn(**call, fc1=weights[0], fc2=weights[1])
    for fc1, fc2 in ((0, 2), (3, 1), (1, 0), (0, 0)):
        with pytest.raises(ValueError, match="gelu_ffn"):
            _C.gelu_ffn(**call, fc1=weights[fc1], fc2=weights[fc2])


@pytest.mark.parametrize("sizes", [(-1, 4), (4, -1), (2**31, 4), (2**62, 2**62), (2**24 + 1, 1)])
def test_sizes_beyond_reason_are_refused(sizes):
    for dtype in ("float32", "bfloat16", "int8"):
        with pytest.raises(ValueError):
            _C.prepacked_size(dtype, *sizes)
        with pytest.raises(ValueError):
            _C.view_weights(b"", dtype, *sizes)


@pytest.mark.parametrize("op_name, argument", sorted(LOOKED_UP))
def test_a_shorter_table_is_not_read_beyond_its_end(op_name, argument, monkeypatch):
    """Behind the end stand NaN: with all numbers below it nothing of them is in the results, else it is refused."""
    outcomes = set()
    for name, arguments in recorded_calls(op_name, monkeypatch, False):
        table = arguments.get(argument)
        for rows in range(len(table) + 1) if (name, argument) in LOOKED_UP else ():
            cut = torch.cat([table[:rows], table.new_full((len(table) + 1 - rows, *table.shape[1:]), float("nan"))])
            # Also with nothing behind it, which AddressSanitizer watches (test_sanitizers.py).
            leaves = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
            for given in (cut[:rows], cut[:rows].clone()):
                try:
                    getattr(_C, name)(**arguments | {argument: given})
                    outcomes.add("computed")
                except (IndexError, ValueError):
                    outcomes.add("refused")
            assert all(leaf.isfinite().all() for leaf in leaves)
    assert outcomes == {"computed", "refused"}
