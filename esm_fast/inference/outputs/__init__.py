"""What can be made of each protein: one file an output, found by its name.

A file of this package has OUTPUTS, {name: function(layer) -> Output}; nothing else lists them. `make` finds an output
for the stream, for data sets and for the command line.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from ...ops import StackPool
from ...sequences.batching import PackedBatch
from ..windows import Segment


@dataclass(frozen=True)
class Batch:
    """Segments as the model gets them: packed on its device, and where the tokens of each stand, from the host.

    dtype: of representations.
    """

    packed: PackedBatch
    segments: list[Segment]
    bounds: list[tuple[int, int]]
    dtype: torch.dtype
    _made: dict = field(default_factory=dict)

    def once(self, key, make: Callable[["Batch"], Any]) -> Any:
        """make(batch), once for all outputs that name it by this key, such as those of different layers."""
        if key not in self._made:
            self._made[key] = make(self)
        return self._made[key]

    def spans(self) -> Iterator[tuple[Segment, int, int]]:
        """Each segment with its tokens' bounds, <cls> and <eos> included."""
        return ((segment, *bound) for segment, bound in zip(self.segments, self.bounds, strict=True))


class Needs(NamedTuple):
    """What an output needs of the model's pass over a batch; the pass makes what all outputs need, once.

    layers: representations, all rows. pools: what is pooled in the pass. rows: int64, ascending, tokens whose last
    representation is wanted. contacts: the maps.
    """

    layers: tuple[int, ...] = ()
    pools: tuple[StackPool, ...] = ()
    rows: np.ndarray | None = None
    contacts: bool = False


class Given(NamedTuple):
    """What the pass made: the representations and maps of all outputs (see `models`), this output's pools and rows."""

    model: Any
    representations: dict
    pooled: list
    rows: Any
    contacts: list | None


class Output:
    """One array to make of each protein. Subclasses are values: equal ones make equal arrays.

    name: as users ask for it. layer: the representation it is made of, or None. per: what a row of it is of, a
    "protein", a "residue" or a "pair" of residues.
    """

    name: str
    layer: int | None = None
    per: ClassVar[str]

    def needs(self, batch: Batch) -> Needs:
        """What it needs of the model for a batch."""
        raise NotImplementedError

    def reduce(self, given: Given, batch: Batch) -> list:
        """A part for each segment."""
        raise NotImplementedError

    def join(self, whole, part, segment: Segment):
        """The parts of a long protein's windows so far, with the next; `whole` is None for the first."""
        raise ValueError(f"{segment.label!r} has {segment.residues} residues: {self.name} cannot be made of windows")

    def finish(self, whole) -> np.ndarray:
        """The protein's array: of its only part, or of all, joined."""
        return whole


@functools.cache
def outputs() -> dict[str, Callable[[int | None], Output]]:
    """By name."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return {name: made for module in modules for name, made in module.OUTPUTS.items()}


def pools(per: str | None = None) -> list[str]:
    """What a layer's representation can be made into; or only into a row of a "protein", or of a "residue"."""
    made = {name: of_layer(0) for name, of_layer in outputs().items()}
    return [name for name, output in made.items() if output.layer is not None and per in (None, output.per)]


def make(name: str, layer: int | None = None) -> Output:
    """An output by name; layer: 0 to the model's number of them, for those made of one. Raises ValueError."""
    if name not in outputs():
        raise ValueError(f"there is no output {name!r}; choose one of {', '.join(outputs())}")
    return outputs()[name](layer)
