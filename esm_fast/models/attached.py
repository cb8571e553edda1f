"""What users attach to a model, and what becomes of it: one place decides, for our models and for `accelerate`.

A fused kernel reads weights; it calls no module. So before each forward every module is looked at:

* One of the class that belongs there, with nothing attached: its parameters say all. It is computed fused.
* One that computes something of its own, but row by row (an adapter of peft's, a parametrization, pruning, weight_norm,
  a quantised matrix): it is called, on packed rows; its neighbours stay fused.
* Anything else, such as a hook, which may expect the padded shape, or a class that is not known: `NotPackable`. The
  whole model is computed by calling its modules, as its own package does, and a `NotPackedWarning` says why.

The look at a model of 33 layers takes about a quarter of a millisecond.
"""

import functools
import warnings

from torch import nn
from torch.nn.modules import module as torch_module

from ..ops.contract import PLAIN


class NotPackable(ValueError):
    """Why a model, as it is now or as it was called, cannot run packed."""


class NotPackedWarning(UserWarning):
    """A call was computed module by module on padded tokens, not by esm_fast's kernels; the message says why."""


def warn_not_packed(reason: NotPackable, stacklevel: int = 4) -> None:
    """Tells the user, once a place and reason, that the modules themselves ran."""
    text = f"esm_fast did not speed this up, the modules were called one by one: {reason}"
    warnings.warn(text, NotPackedWarning, stacklevel=stacklevel)


# Classes whose calls the fused path leaves out -> the forward that it computes.
_FORWARDS: dict[type[nn.Module], object] = {}


def left_out(*kinds: type[nn.Module]) -> None:
    """Notes classes of modules that are read and not called: what replaces their forward has to be noticed."""
    for kind in kinds:
        _FORWARDS.setdefault(kind, kind.forward)


left_out(nn.Linear, nn.LayerNorm, nn.Embedding, nn.ModuleList, nn.Sigmoid)


def require_nothing_for_all() -> None:
    """NotPackable where torch is asked to call a hook for every module there is, or a class got another forward."""
    for kind, forward in _FORWARDS.items():
        if kind.forward is not forward:
            raise NotPackable(f"the forward of the class {kind.__module__}.{kind.__qualname__} was replaced")
    found = torch_module
    if (
        found._global_forward_hooks
        or found._global_forward_pre_hooks
        or found._global_backward_hooks
        or found._global_backward_pre_hooks
    ):
        raise NotPackable("a hook was registered for all modules, which would not run")


def is_plain(module: nn.Module, kind: type[nn.Module], path: str) -> bool:
    """Whether a module's parameters say all that it computes; if not, it is to be called, on packed rows.

    kind: the only class that belongs there. Raises NotPackable for a module that must not be passed over, nor be given
    packed rows.
    """
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    ):
        _require_harmless(module, path)
    if type(module) is kind:
        own = module._parameters
        if not own and not issubclass(kind, nn.Linear | nn.LayerNorm | nn.Embedding):
            return True
        return type(own.get("weight")) in PLAIN and (type(own.get("bias")) in PLAIN or issubclass(kind, nn.Embedding))
    _require_rowwise(module, kind, path)
    return False


def require_own(module: nn.Module | None, kind: type[nn.Module], path: str) -> None:
    """NotPackable for a module that holds others unless it is of its class, with nothing attached."""
    if type(module) is not kind:
        raise NotPackable(f"{path} is {_class(module)}, not {kind.__module__}.{kind.__qualname__}")
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    ):
        _require_harmless(module, path)


def fixed(*names: str):
    """A class's __setattr__ under which what its forward does not read keeps its first value, or the class's."""

    def set_attribute(self, name, value):
        if name in names and value != (before := self.__dict__.get(name, getattr(type(self), name, value))):
            raise AttributeError(f"{name} is {before!r} wherever esm_fast computes this model, and cannot be set")
        nn.Module.__setattr__(self, name, value)

    return set_attribute


def require_numbers(module: nn.Module, path: str, **numbers: float | None) -> None:
    """NotPackable for a module that was given another number than it was made with, which only calling it heeds."""
    for name, number in numbers.items():
        found = module.__dict__.get(name, module._parameters.get(name, number))
        if found != number:
            raise NotPackable(f"{path}.{name} is {found!r:.40}, not {number!r}")


# Hooks that do to a module's weights, or to no numbers at all, what calling the module does anyway.
_HARMLESS = (
    "transformers.utils.",  # records hidden states and attentions, which we return ourselves
    "torch.nn.utils.",  # weight_norm, spectral_norm, prune: make the weight anew, so that it is no parameter
)
_WANTS_GRADIENTS = ("make_inputs_require_grad", "make_inputs_require_grads")  # transformers' and peft's, of embeddings


def _require_harmless(module: nn.Module, path: str) -> None:
    if "forward" in module.__dict__:
        raise NotPackable(f"the forward of {path} was replaced")
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        for hook in hooks.values():
            where = str(getattr(hook, "__module__", None) or type(hook).__module__)
            harmless = where.startswith(_HARMLESS) or getattr(hook, "__name__", "") in _WANTS_GRADIENTS
            if not harmless:
                raise NotPackable(f"{path} has a hook, which would not run")


_ROWWISE = {nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.Identity, nn.Dropout, nn.GELU, nn.ReLU, nn.SiLU}
_HOLDERS = {nn.Sequential, nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList}


@functools.cache
def _acts_on_rows(kind: type[nn.Module]) -> bool:
    """Whether instances compute each row of their input by itself, whatever the shape around it."""
    if kind in _ROWWISE or kind in _HOLDERS:
        return True
    where = kind.__module__
    if where == "torch.nn.utils.parametrize":  # of a module the class is made anew, with properties for its parameters
        return kind.__name__ == "ParametrizationList" or kind.__mro__[1] in _ROWWISE
    if where.startswith("peft."):
        return "MultiheadAttention" not in kind.__name__ and "Conv" not in kind.__name__
    return where.startswith("bitsandbytes.nn.") and issubclass(kind, nn.Linear)


def _require_rowwise(module: nn.Module, kind: type[nn.Module], path: str) -> None:
    if not _acts_on_rows(type(module)):
        expected = "" if type(module) is kind else f", not {kind.__module__}.{kind.__qualname__}"
        raise NotPackable(f"{path} is {_class(module)}{expected}")
    for name, inner in module.named_children():
        if name == "parametrizations":
            continue  # what makes the weight, not what is given rows
        require_own(inner, type(inner), f"{path}.{name}")
        _require_rowwise(inner, type(inner), f"{path}.{name}")


def acts_on_rows(kind: type[nn.Module]) -> type[nn.Module]:
    """Decorates a class of this package whose instances do."""
    _ROWWISE.add(kind)
    return kind


def _class(module: nn.Module | None) -> str:
    return "missing" if module is None else f"{type(module).__module__}.{type(module).__qualname__}"
