"""Kernels under autograd: an op's outputs with a graph behind them, whatever computed them."""

import functools
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree


def run_with_gradients(op, kernel, values: tuple):
    """The kernel's outputs for all of the op's arguments, by position, with autograd's graph behind them."""
    if kernel.differentiable:
        return kernel.differentiable(*values)
    leaves, structure = pytree.tree_flatten(values)
    return _WithBackward.apply(op, kernel, structure, *leaves)


_SECOND = (
    "kernels have no second derivatives, which create_graph=True asks for, and neither has torch's fused attention: "
    "compute them by the original package's model (of one that was accelerated: esm_fast.unaccelerate)"
)


def first_order(backward: Callable) -> Callable:
    """Decorates a backward that cannot be differentiated. torch's own `once_differentiable` notices by backward() only:
    torch.autograd.grad passes its node by, and a second derivative would silently lack what goes through it."""
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx, *incoming):
        if torch.is_grad_enabled():
            raise RuntimeError(_SECOND)
        return once(ctx, *incoming)

    return checked


class _WithBackward(torch.autograd.Function):
    """Any kernel, differentiable: by its own backward, or by the reference's on recomputed inputs.

    autograd sees the tensors inside sequences too: it is handed the leaves of the arguments.
    """

    @staticmethod
    def forward(ctx, op, kernel, structure: pytree.TreeSpec, *leaves):
        values = pytree.tree_unflatten(leaves, structure)
        if kernel.train is not None:
            outputs, kept = kernel.train(*values)
        else:
            outputs = kernel.forward(*values)
            kept = outputs if isinstance(outputs, tuple) else (outputs,)
        ctx.op, ctx.kernel, ctx.structure = op, kernel, structure
        ctx.plain = [None if isinstance(v, torch.Tensor) else v for v in leaves]
        ctx.where = [i for i, v in enumerate(leaves) if isinstance(v, torch.Tensor)]
        ctx.inputs = len(ctx.where)
        ctx.save_for_backward(*(leaves[i] for i in ctx.where), *(o for o in kept if o is not None))
        return outputs

    @staticmethod
    @first_order
    def backward(ctx, *grad_outputs):
        saved = ctx.saved_tensors
        leaves = list(ctx.plain)
        for i, tensor in zip(ctx.where, saved[: ctx.inputs], strict=True):
            leaves[i] = tensor
        needs = ctx.needs_input_grad[3:]
        if ctx.kernel.backward is not None:
            values = pytree.tree_unflatten(leaves, ctx.structure)
            grads = pytree.tree_leaves(ctx.kernel.backward(values, saved[ctx.inputs :], grad_outputs))
        else:
            grads = _reference_grads(ctx.op.reference, ctx.structure, leaves, needs, grad_outputs)
        return (None, None, None, *(g if need else None for g, need in zip(grads, needs, strict=True)))


def _reference_grads(reference: Callable, structure: pytree.TreeSpec, values: list, needs, grad_outputs) -> list:
    with torch.enable_grad():
        leaves = [v.detach().requires_grad_() if need else v for v, need in zip(values, needs, strict=True)]
        outputs = reference(*pytree.tree_unflatten(leaves, structure))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # An output may depend on no input at all, such as the contacts of a sequence without residues.
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        if not pairs:
            return [None] * len(values)
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        got = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    grads = iter(got)
    return [next(grads) if need else None for need in needs]
