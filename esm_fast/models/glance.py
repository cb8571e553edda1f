"""Layers that were looked at module by module and found plain (see `attached`): whether they still are, asked in bulk.

Looking at 33 layers and gathering their weights takes half a millisecond in every call; a GPU computes a short protein
in less. Nothing is taken for unchanged here: what holds what, classes, hooks, numbers and parameters are read again, as
lists that are compared at once. What differs in anything is looked at in the slow way.
"""

from collections.abc import Iterable
from itertools import chain, repeat
from operator import contains, is_, itemgetter

import torch
from torch import nn

from .. import ops
from ..ops.checked import Checked
from ..ops.contract import PLAIN
from .layers import PROJECTIONS

_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NUMBERS = itemgetter("num_heads", "head_dim", "embed_dim", "scaling")
_PARAMETERS, _PAIR, _EPS = itemgetter("_parameters"), itemgetter("weight", "bias"), itemgetter("eps")
_PARTS = 8  # of a layer, each with a weight and a bias


class Glance:
    """layers: all of them plain in both halves, with nothing attached."""

    def __init__(self, layers: Iterable[nn.Module]):
        self.layers = list(layers)
        inner = [layer._modules["self_attn"] for layer in self.layers]
        self._parts = list(chain.from_iterable(map(_parts, self.layers, inner)))
        self._inner, self._holders = inner, [*self.layers, *inner]
        self._all = [*self._parts, *self._holders]
        self._before = self._now()
        self._tensors: list[torch.Tensor] = []
        self._eps: tuple | None = None
        self._firsts: dict[int, Checked] = {}

    def _now(self) -> tuple:
        """All but hooks and parameters."""
        held = [list(holder._modules.values()) for holder in self._holders]
        numbers = list(map(_NUMBERS, map(vars, self._inner)))
        own = [(layer.heads, layer.hidden_dropout, layer.attention_dropout) for layer in self.layers]
        return held, numbers, own, list(map(type, self._all))

    def weights(self) -> list[ops.LayerWeights] | None:
        """Of all layers, as they are now, the same list if they are the same; None unless everything is as it was."""
        states = list(map(vars, self._all))
        try:
            changed = self._now() != self._before or any(chain.from_iterable(map(_HOOKS, states)))
            if changed or any(map(contains, states, repeat("forward"))):
                return None
            parts = states[: len(self._parts)]
            tensors = list(chain.from_iterable(map(_PAIR, map(_PARAMETERS, parts))))
            eps = list(map(_EPS, parts[::_PARTS])), list(map(_EPS, parts[5::_PARTS]))
        except KeyError:  # something was taken out
            return None
        if not set(map(type, tensors)) <= PLAIN:
            return None
        if eps != self._eps or not all(map(is_, tensors, self._tensors)):
            own = zip(_of_layers(tensors), *eps, strict=True)
            self._weights = [ops.LayerWeights(*values, *both) for values, *both in own]
            # Last: another thread that finds these equal takes the weights.
            self._firsts, self._tensors, self._eps = {}, tensors, eps
        return self._weights

    def first(self, depth: int) -> Checked:
        """Of so many layers, of those that `weights` gave last: checked once, see `Checked`."""
        if depth not in self._firsts:
            self._firsts[depth] = Checked.of(self._weights[:depth], self._tensors[: 2 * _PARTS * depth])
        return self._firsts[depth]


def _parts(layer: nn.Module, inner: nn.Module) -> list[nn.Module]:
    """In the order of `ops.LayerWeights`."""
    own, projections = layer._modules, inner._modules
    first, second = own["self_attn_layer_norm"], own["final_layer_norm"]
    return [first, *(projections[name] for name in PROJECTIONS), second, own["fc1"], own["fc2"]]


def _of_layers(tensors: list) -> list[list]:
    return [tensors[at : at + 2 * _PARTS] for at in range(0, len(tensors), 2 * _PARTS)]
