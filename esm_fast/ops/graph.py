"""The ops as operators of PyTorch's dispatcher: what a graph of torch.compile holds of them.

The compiler must not look into an op: kernels read memory by address, choose by architecture, and the reference reads
the offsets on the host. So while it traces, a call of an op becomes one operator, `torch.ops.esm_fast.<op>`, which only
says what shapes come out; when the graph runs, the operator calls the op. Without torch.compile nobody comes by here.

The gradient is an operator too. It computes the op again, as a checkpoint does, so that nothing but the arguments is
kept between forward and backward, whatever the kernel would keep.
"""

import inspect

import torch
from torch import library

from .registry import Op

_TYPES = {int: "SymInt", float: "float", bool: "bool"}
_LIBRARY = library.Library("esm_fast", "DEF")


def define(op: Op) -> None:
    """Registers the operators of an op: `<op>` and `<op>_backward`."""
    arguments, does, back = _arguments(op), _Operator(op), f"{op.name}_backward"
    _LIBRARY.define(f"{op.name}({arguments}, str? backend=None) -> Tensor[]")
    _LIBRARY.impl(op.name, does.forward, "CompositeExplicitAutograd")
    library.register_fake(f"esm_fast::{op.name}", does.shapes, lib=_LIBRARY)
    library.register_autograd(f"esm_fast::{op.name}", does.differentiate, setup_context=does.remember, lib=_LIBRARY)
    _LIBRARY.define(f"{back}(Tensor?[] grads, bool[] needs, {arguments}, str? backend=None) -> Tensor[]")
    _LIBRARY.impl(back, does.backward, "CompositeExplicitAutograd")
    _LIBRARY.impl(back, library.fallthrough_kernel, "Autograd")  # it calls autograd itself
    library.register_fake(f"esm_fast::{back}", does.gradient_shapes, lib=_LIBRARY)


class _Operator:
    """What the two operators of an op do. `values` are the op's arguments by position, and the backend's name."""

    def __init__(self, op: Op):
        self.op = op
        self.defaults = [*(parameter.default for parameter in op.signature.parameters.values()), None]

    def filled(self, values) -> tuple[list, str | None]:
        """(the op's arguments, the backend): the dispatcher leaves out what has the default's value at the end."""
        *values, backend = (*values, *self.defaults[len(values) :])
        return values, backend

    def forward(self, *values) -> list[torch.Tensor]:
        values, backend = self.filled(values)
        return _tensors(self.op.run(*values, backend=backend))

    def shapes(self, *values) -> list[torch.Tensor]:
        return _tensors(self.op.shapes(*self.filled(values)[0]))

    def remember(self, ctx, inputs, output) -> None:
        ctx.plain = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        ctx.where = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.where))

    def differentiate(self, ctx, grads) -> tuple[torch.Tensor | None, ...]:
        values = list(ctx.plain)
        for i, tensor in zip(ctx.where, ctx.saved_tensors, strict=True):
            values[i] = tensor
        given = ctx.needs_input_grad
        needs = [*given, *[False] * len(values)][: len(self.defaults) - 1]
        found = iter(getattr(torch.ops.esm_fast, f"{self.op.name}_backward")(grads, needs, *values))
        return tuple(next(found) if need else None for need in given)

    def backward(self, grads, needs, *values) -> list[torch.Tensor]:
        """The gradients of the arguments that need one."""
        values, backend = self.filled(values)
        with torch.enable_grad():
            values = [v.detach().requires_grad_() if need else v for v, need in zip(values, needs, strict=True)]
            outputs = _tensors(self.op.run(*values, backend=backend))
        wanted = [value for value, need in zip(values, needs, strict=True) if need]
        # An output may depend on no input at all, such as a sequence without residues.
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        if not pairs:
            return [torch.zeros_like(value, memory_format=torch.contiguous_format) for value in wanted]
        outputs, grads = zip(*pairs, strict=True)
        got = torch.autograd.grad(outputs, wanted, grads, allow_unused=True, materialize_grads=True)
        return [grad.contiguous() for grad in got]

    def gradient_shapes(self, grads, needs, *values) -> list[torch.Tensor]:
        pairs = zip(self.filled(values)[0], needs, strict=True)
        return [torch.empty_like(v, memory_format=torch.contiguous_format) for v, need in pairs if need]


def _arguments(op: Op) -> str:
    """The schema's: what the reference does not annotate is a tensor, and may be None if that is its default."""
    found = []
    for parameter in op.signature.parameters.values():
        optional = parameter.default is None
        kind = _TYPES.get(parameter.annotation, "Tensor?" if optional else "Tensor")
        given = parameter.default is not inspect.Parameter.empty
        found.append(f"{kind} {parameter.name}" + (f"={parameter.default}" if given else ""))
    return ", ".join(found)


def _tensors(outputs) -> list[torch.Tensor]:
    """Contiguous, as the compiler was told."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [out.contiguous() for out in outputs if out is not None]
