"""Another package's model, computed by ours: a shadow model made of the host's own parameters.

The shadow owns no tensor. Before every forward the host is walked and its parameters are handed to the shadow by
reference, so .to(), .half(), load_state_dict, replaced weights and cut layers are all seen. What users have attached is
judged as in our own models, by `models.attached`: a module that has to be called stands in the shadow itself, and what
cannot run packed raises `NotPackable`. The walk takes about a millisecond for 33 layers.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..alphabet import MASK, PAD
from ..models.arguments import Unscriptable
from ..models.attached import (
    NotPackable,
    NotPackedWarning,
    is_plain,
    left_out,
    require_nothing_for_all,
    require_own,
    warn_not_packed,
)
from ..models.encoder import Encoder
from ..models.family import Config, Family, LayoutError, of_config
from ..models.padded import api_class

__all__ = ["Layout", "NotPackable", "NotPackedWarning", "PackedEncoder", "Part", "examine", "find", "warn_not_packed"]


class Part(NamedTuple):
    """A module of the host: its path, the class that belongs there, and the module of ours that takes its parameters
    (None if it has none of its own: then it must be of that class)."""

    path: str
    kind: type[nn.Module]
    ours: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Layout:
    """How a host is built: parts of the whole, and parts of each module in the list at `layers`.

    package: the host's, by which the families name the parts of their own. family_of(host) tells the family, or raises
    NotPackable. describe(host, top, layers) gets the modules by path ({path: module}, and one such dictionary a layer)
    and returns the sizes that all families have, as `Family.describe` takes them, or raises NotPackable. Of a layer as
    it is now, dropouts(layer) are the probabilities for its hidden rows and for its attention; recomputes(layers) tells
    whether the backward pass is to compute layers again (gradient checkpointing).
    """

    package: str
    top: tuple[Part, ...]
    layers: str
    per_layer: tuple[Part, ...]
    family_of: Callable[[nn.Module], Family]
    describe: Callable[[nn.Module, dict, list[dict]], dict]
    dropouts: Callable[[dict], tuple[float, float]] = lambda layer: (0.0, 0.0)
    recomputes: Callable[[list[dict]], bool] = lambda layers: False

    def __post_init__(self):
        left_out(*(part.kind for part in (*self.top, *self.per_layer)))

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
    """{path: module} of the parts; NotPackable for one that is missing or changed beyond what `attached` knows."""
    found = {"": root}
    for path, kind, ours, optional in parts:
        module = root if not path else _child(found, path)
        if module is None and optional:
            continue
        place = (where + path).rstrip(".")
        if module is None or ours is None:
            require_own(module, kind, place)
        else:
            is_plain(module, kind, place)
        found[path] = module
    return found


def _child(found: dict[str, nn.Module], path: str) -> nn.Module | None:
    """The module at a path; its parent may be a part that was found before it."""
    parent, _, name = path.rpartition(".")
    if parent not in found:
        parent_module = _child(found, parent)
        return parent_module and parent_module._modules.get(name)
    return found[parent]._modules.get(name)


def examine(host: nn.Module, layout: Layout) -> tuple[Config, dict, list[dict]]:
    """The sizes of a host, and its modules as `Layout.describe` gets them.

    Raises:
        NotPackable: the host is of no family that we have, or was changed in a way ours does not know.
    """
    require_nothing_for_all()
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


class PackedEncoder(Unscriptable):
    """What our subclasses of the hosts' classes share."""

    esm_fast_layout: Layout
    esm_fast_backend: str | None = None

    def esm_fast_shadow(self) -> Encoder:
        """Our model over the parameters as they are now; NotPackable as `examine`, or if the host is not ready."""
        layout = self.esm_fast_layout
        config, top, layers = examine(self, layout)
        shadow = _SHADOWS.get(self)
        if shadow is None or shadow.model.config != config:
            shadow = _SHADOWS[self] = _Shadow(config, layout)
        shadow.take(top, shadow.top)
        for layer, found, targets in zip(shadow.model.layers, layers, shadow.layers, strict=True):
            shadow.take(found, targets)
            layer.hidden_dropout, layer.attention_dropout = layout.dropouts(found)
        shadow.model.recompute = layout.recomputes(layers)
        shadow.model.backend = self.esm_fast_backend
        return shadow.model


class _Target(NamedTuple):
    """Where a module of ours stands in the shadow: a module of the host that is to be called takes its place."""

    holder: dict[str, nn.Module]
    name: str
    ours: nn.Module
    kind: type[nn.Module]


class _Shadow:
    """Our model, and which of its modules takes the parameters of which of the host's, by the host's paths."""

    def __init__(self, config: Config, layout: Layout):
        with torch.device("meta"):
            self.model = api_class(config)(config)
        self.model.pads_by_itself = False  # the host's own code does
        self.top = self._targets(self.model, layout.top + layout.own(of_config(config)))
        per_layer = layout.per_layer + layout.own_of_layers(of_config(config))
        self.layers = [self._targets(layer, per_layer) for layer in self.model.layers]

    @staticmethod
    def _targets(root: nn.Module, parts: tuple[Part, ...]) -> dict[str, _Target]:
        modules, found = dict(root.named_modules()), {}
        for part in parts:
            if part.ours in modules:
                holder, _, name = part.ours.rpartition(".")
                found[part.path] = _Target(modules[holder]._modules, name, modules[part.ours], part.kind)
        return found

    @staticmethod
    def take(found: dict[str, nn.Module], targets: dict[str, _Target]) -> None:
        for path, (holder, name, ours, kind) in targets.items():
            source = found[path]
            if not is_plain(source, kind, path):
                holder[name] = source
                continue
            holder[name] = ours
            for parameter in ours._parameters:
                if source._parameters.get(parameter) is None:
                    raise NotPackable(f"{path} has no parameter {parameter!r}")
                ours._parameters[parameter] = source._parameters[parameter]
            for buffer in ours._buffers:
                ours._buffers[buffer] = source._buffers[buffer]
            if isinstance(ours, nn.LayerNorm):
                ours.eps = source.eps


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
