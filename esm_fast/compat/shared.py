"""Another package's model, computed by ours: a shadow model made of the host's own parameters.

The shadow owns no tensor. Before every forward the host is walked and its parameters are handed to the shadow by
reference, so .to(), .half(), load_state_dict, replaced weights and cut layers are all seen. A host that is not exactly
what its layout says (a LoRA layer, a hook, active dropout, another position embedding) raises `NotPackable`: nothing
the user put into the model is passed over. The walk takes about a millisecond for 33 layers.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..alphabet import MASK, PAD
from ..models.encoder import Encoder
from ..models.family import Config, Family, LayoutError, of_config
from .fair_esm import api_class


class NotPackable(ValueError):
    """Why a model, as it is now or as it was called, cannot run packed."""


class NotPackedWarning(UserWarning):
    """A call was computed by the original package's code, not by esm_fast; the message says why."""


def warn_not_packed(reason: NotPackable) -> None:
    """Tells the user, once a place and reason, that the original code ran."""
    warnings.warn(f"esm_fast did not speed this up, the original code ran: {reason}", NotPackedWarning, stacklevel=4)


class Part(NamedTuple):
    """A module of the host: its path, the only class it may have, and the module of ours that takes its parameters
    (None if it has none of its own)."""

    path: str
    kind: type[nn.Module]
    ours: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Layout:
    """How a host is built: parts of the whole, and parts of each module in the list at `layers`.

    package: the host's, by which the families name the parts of their own. family_of(host) tells the family, or raises
    NotPackable. describe(host, top, layers) gets the modules by path ({path: module}, and one such dictionary a layer)
    and returns the sizes that all families have, as `Family.describe` takes them, or raises NotPackable.
    require_ready(layers) raises it for what may change from call to call.
    """

    package: str
    top: tuple[Part, ...]
    layers: str
    per_layer: tuple[Part, ...]
    family_of: Callable[[nn.Module], Family]
    describe: Callable[[nn.Module, dict, list[dict]], dict]
    require_ready: Callable[[list[dict]], None] = lambda layers: None

    def own(self, family: Family) -> tuple[Part, ...]:
        """The parts that the family has besides `top`."""
        return self._named(family.parts)

    def own_of_layers(self, family: Family) -> tuple[Part, ...]:
        """The parts that the family has besides `per_layer`."""
        return self._named(family.layer_parts)

    def _named(self, parts: dict) -> tuple[Part, ...]:
        return tuple(
            Part(path, _named(kind), ours, optional) for path, kind, ours, optional in parts.get(self.package, ())
        )


def _named(kind: str) -> type[nn.Module]:
    module, _, name = kind.partition(":")
    return getattr(importlib.import_module(module), name)


def find(root: nn.Module, parts: tuple[Part, ...], where: str = "") -> dict[str, nn.Module]:
    """{path: module} of the parts; NotPackable for one that is missing or changed."""
    found = {"": root}
    for path, kind, _, optional in parts:
        module = root if not path else _child(found, path)
        if module is None and optional:
            continue
        if type(module) is not kind:
            place = (where + path).rstrip(".")
            raise NotPackable(f"{place} is {_class(module)}, not {kind.__module__}.{kind.__qualname__}")
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            _check_hooks(module, where + path)
        if "forward" in module.__dict__:
            raise NotPackable(f"the forward of {where}{path} was replaced")
        found[path] = module
    return found


def _child(found: dict[str, nn.Module], path: str) -> nn.Module | None:
    """The module at a path; its parent may be a part that was found before it."""
    parent, _, name = path.rpartition(".")
    if parent not in found:
        parent_module = _child(found, parent)
        return parent_module and parent_module._modules.get(name)
    return found[parent]._modules.get(name)


def _check_hooks(module: nn.Module, path: str) -> None:
    # transformers' own hooks record hidden states and attentions, which we return ourselves.
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        if not all(str(getattr(hook, "__module__", "")).startswith("transformers.utils.") for hook in hooks.values()):
            raise NotPackable(f"{path} has a hook, which would not run")


def _class(module: nn.Module | None) -> str:
    return "missing" if module is None else f"{type(module).__module__}.{type(module).__qualname__}"


def examine(host: nn.Module, layout: Layout) -> tuple[Config, dict, list[dict]]:
    """The sizes of a host, and its modules as `Layout.describe` gets them.

    Raises:
        NotPackable: the host is of no family that we have, or was changed in a way ours does not know.
    """
    family = layout.family_of(host)
    own = layout.own(family)
    top = find(host, layout.top[:1] + own + layout.top[1:])
    of_layers = layout.own_of_layers(family)
    per_layer = layout.per_layer + of_layers
    layers = [find(layer, per_layer, f"{layout.layers}.{i}.") for i, layer in enumerate(top[layout.layers])]
    parts = {part.ours: top[part.path] for part in own if part.path in top}
    parts |= {f"layers.{i}.{p.ours}": found[p.path] for i, found in enumerate(layers) for p in of_layers}
    check_tables([module for module in parts.values() if isinstance(module, nn.Embedding)])
    sizes = layout.describe(host, top, layers)
    try:
        return family.describe(sizes, parts), top, layers
    except LayoutError as reason:
        raise NotPackable(str(reason)) from None


class PackedEncoder:
    """What our subclasses of the hosts' classes share."""

    esm_fast_layout: Layout
    esm_fast_backend: str | None = None

    def esm_fast_shadow(self) -> Encoder:
        """Our model over the parameters as they are now; NotPackable as `examine`, or if the host is not ready."""
        layout = self.esm_fast_layout
        config, top, layers = examine(self, layout)
        layout.require_ready(layers)
        shadow = _SHADOWS.get(self)
        if shadow is None or shadow.model.config != config:
            shadow = _SHADOWS[self] = _Shadow(config, layout)
        shadow.take(top, shadow.top)
        for found, targets in zip(layers, shadow.layers, strict=True):
            shadow.take(found, targets)
        shadow.model.backend = self.esm_fast_backend
        return shadow.model


class _Shadow:
    """Our model, and which of its modules takes the parameters of which of the host's, by the host's paths."""

    def __init__(self, config: Config, layout: Layout):
        with torch.device("meta"):
            self.model = api_class(config)(config)
        self.top = self._targets(self.model, layout.top + layout.own(of_config(config)))
        per_layer = layout.per_layer + layout.own_of_layers(of_config(config))
        self.layers = [self._targets(layer, per_layer) for layer in self.model.layers]

    @staticmethod
    def _targets(root: nn.Module, parts: tuple[Part, ...]) -> dict[str, nn.Module]:
        modules = dict(root.named_modules())
        return {part.path: modules[part.ours] for part in parts if part.ours in modules}

    @staticmethod
    def take(found: dict[str, nn.Module], targets: dict[str, nn.Module]) -> None:
        for path, target in targets.items():
            source = found[path]._parameters
            for name in target._parameters:
                if source.get(name) is None:
                    raise NotPackable(f"{path} has no parameter {name!r}")
                target._parameters[name] = source[name]
            for name in target._buffers:
                target._buffers[name] = found[path]._buffers[name]
            if isinstance(target, nn.LayerNorm):
                target.eps = found[path].eps


# Beside the hosts, not in them: state_dict, deepcopy, pickle and save_pretrained see nothing of it.
_SHADOWS: "WeakKeyDictionary[nn.Module, _Shadow]" = WeakKeyDictionary()


def check_tables(tables: Sequence[nn.Embedding]) -> None:
    """NotPackable for tables that do more than look up."""
    for table in tables:
        if table.padding_idx != PAD or table.max_norm is not None:
            found = f"padding_idx {table.padding_idx}, max_norm {table.max_norm}"
            raise NotPackable(f"an embedding has {found}; esm_fast knows {PAD}, None")


def check_tokens(table: nn.Embedding, token_dropout: bool, mask: int | None) -> None:
    """NotPackable for a table of tokens that is not as all families have it."""
    check_tables([table])
    if token_dropout and mask != MASK:
        raise NotPackable(f"its <mask> token is {mask}; in the models that esm_fast knows it is {MASK}")


def same_heads(counts: list[int]) -> int:
    """The number of attention heads, which must be one for all layers."""
    if len(set(counts)) != 1:
        raise NotPackable(f"its layers have {sorted(set(counts))} attention heads")
    return counts[0]
