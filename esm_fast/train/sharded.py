"""Updates of which each process makes a share, element by element (ZeRO-1, Rajbhandari et al. 2020).

Parameters lie in flat buckets. The gradients of a bucket are summed in float32 to whom they belong as soon as the
backward pass has the last of them; each process updates its share of the bucket; and the new values are handed out in
the type that the layers compute in, while the next forward pass comes to them layer by layer. On the wire that is, a
parameter and process, (4 + 2) x (N - 1) / N bytes in half precision, 4 + 4 in fp32.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

from .model import MaskedLM
from .processes import Processes
from .recipe import Recipe
from .updates import MOMENTS, decays, options, stepped

_BUCKET = 8 * 2**20  # elements: 32 MB of gradients
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass
class _Bucket:
    """Parameters one after the other, filled up to a multiple of the number of processes.

    values: float32, this process's share of which is current; sums: of gradients, float32; own: the share, a parameter
    over part of `values`. halves: what the layers compute with, `values` itself in fp32.
    """

    names: list[str]
    bounds: list[tuple[int, int]]
    layer: int  # the first that needs it, -1 what stands before the layers; the head's is the last
    values: torch.Tensor
    sums: torch.Tensor
    halves: torch.Tensor
    own: nn.Parameter
    at: int  # where `own` begins
    missing: int = 0  # gradients of the last batch that are not there yet
    summing: Callable[[], None] | None = None
    coming: list = field(default_factory=list)  # new values under way


class Sharded:
    """See the module. The same API as `updates.Replicated`."""

    factor = 1

    def __init__(self, recipe: Recipe, lm: MaskedLM, parameters: dict[str, nn.Parameter], processes: Processes):
        self.parameters, self.processes = parameters, processes
        self.dtype, self.depth = getattr(torch, recipe.precision), recipe.model.layers
        self.buckets = [self._bucket(names) for names in _cut(recipe, parameters)]
        self.leaves = dict(self._leaves())
        self.model = _Gathered(lm, self)
        groups = [(wanted, [b.own for b in self.buckets if decays(recipe, parameters[b.names[0]]) == wanted])
                  for wanted in (True, False)]  # fmt: skip
        self.optimizer = torch.optim.AdamW(
            [{"params": own, "weight_decay": recipe.weight_decay * wanted} for wanted, own in groups if own],
            **options(recipe),
        )
        self._counting, self._next = False, -1
        self._whole = True  # whether every process has all of `values`: in half precision only after `whole`

    def _bucket(self, names: list[str]) -> _Bucket:
        parameters, world = [self.parameters[name] for name in names], self.processes.world
        ends = torch.tensor([p.numel() for p in parameters]).cumsum(0).tolist()
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        size = -(-ends[-1] // world) * world
        values = torch.zeros(size, device=parameters[0].device)
        for parameter, (start, end) in zip(parameters, bounds, strict=True):
            values[start:end].copy_(parameter.detach().flatten())
            parameter.data = values[start:end].view_as(parameter)
        share = size // world
        at = share * self.processes.rank
        own = nn.Parameter(values[at : at + share])
        sums = torch.zeros_like(values)
        own.grad = sums[at : at + share]
        halves = values if self.dtype == torch.float32 else values.to(self.dtype)
        return _Bucket(names, bounds, min(map(self._layer, names)), values, sums, halves, own, at)

    def _layer(self, name: str) -> int:
        if name.startswith(("emb_layer_norm_after.", "lm_head.")):
            return self.depth - 1
        return int(found[1]) if (found := _LAYER.match(name)) else -1

    def _leaves(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What autograd gives gradients to, by the parameter's name: parts of `halves`."""
        for number, bucket in enumerate(self.buckets):
            for name, (start, end) in zip(bucket.names, bucket.bounds, strict=True):
                parameter, total = self.parameters[name], bucket.sums[start:end]
                leaf = parameter
                if self.dtype == torch.float32:
                    parameter.grad = total.view_as(parameter)  # autograd adds to it in place
                else:
                    leaf = bucket.halves[start:end].view_as(parameter).requires_grad_()
                leaf.register_post_accumulate_grad_hook(self._arrived(number, total))
                yield name, leaf

    def _arrived(self, number: int, total: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(leaf: torch.Tensor) -> None:
            if leaf.dtype != torch.float32:
                total.add_(leaf.grad.flatten())
                leaf.grad = None
            if self._counting:
                self.buckets[number].missing -= 1
                self._sum_what_is_ready()

        return hook

    # ---- a step

    def begin(self) -> None:
        for bucket in self.buckets:
            bucket.sums.zero_()

    @contextmanager
    def _last(self) -> Iterator[None]:
        """The last batch: buckets are summed as they fill up, the last layer's first, in the same order everywhere."""
        for bucket in self.buckets:
            bucket.missing = len(bucket.names)
        self._counting, self._next = True, len(self.buckets) - 1
        yield
        self._counting = False
        for bucket in self.buckets:
            bucket.missing = 0
        self._sum_what_is_ready()

    def batch(self, *, last: bool) -> AbstractContextManager:
        return self._last() if last else nullcontext()

    def _sum_what_is_ready(self) -> None:
        while self._next >= 0 and not self.buckets[self._next].missing:
            bucket = self.buckets[self._next]
            bucket.summing = _summed(bucket.sums, bucket.own.grad)
            self._next -= 1

    def norm(self) -> torch.Tensor:
        for bucket in reversed(self.buckets):
            bucket.summing()
            bucket.summing = None
        total = torch.nn.utils.get_total_norm([bucket.own.grad for bucket in self.buckets]).double().square()
        dist.all_reduce(total)
        return total.sqrt()

    def step(self, rate: torch.Tensor, factor: torch.Tensor | None, bad: torch.Tensor) -> None:
        stepped(self.optimizer, [bucket.own.grad for bucket in self.buckets], rate, factor, bad)
        self._hand_out(self.dtype)
        self._whole = self.dtype == torch.float32

    def _hand_out(self, dtype: torch.dtype) -> None:
        """Starts to give everyone every share, in a type; `arrive` waits."""
        for bucket in self.buckets:
            target = bucket.values if dtype == torch.float32 else bucket.halves
            share = bucket.own.detach().to(dtype, copy=True)
            bucket.coming = [_GATHER(target, share, async_op=True), share]

    def arrive(self, layer: int | None = None) -> None:
        """Waits for the values that a layer and those before it need; None: for all."""
        for bucket in self.buckets:
            if bucket.coming and (layer is None or bucket.layer <= layer):
                bucket.coming[0].wait()
                bucket.coming = []

    def whole(self) -> None:
        self.arrive()
        if not self._whole:
            self._hand_out(torch.float32)
            self.arrive()
            self._whole = True

    # ---- for checkpoints: whole tensors, as every other way of updating has them

    def held(self, names: list[str], *, copy: bool = True) -> Iterator[tuple[str, str, torch.Tensor]]:
        """The moments are gathered bucket by bucket; each process copies those that it asks for, to host memory."""
        for bucket in self.buckets:
            state = self.optimizer.state.get(bucket.own)
            for moment in MOMENTS if state else ():
                flat = torch.empty_like(bucket.values)
                _GATHER(flat, state[moment].contiguous())
                for name, (start, end) in zip(bucket.names, bucket.bounds, strict=True):
                    if name in names:
                        yield moment, name, flat[start:end].to("cpu", copy=True).view_as(self.parameters[name])

    def wanted(self, there: set[str], updates: int) -> Iterator[tuple[str, str, torch.Tensor]]:
        self.arrive()
        self.optimizer.state.clear()
        self._wanted = []
        for bucket in self.buckets:
            if not there.intersection(bucket.names):
                continue
            own = bucket.own
            step = torch.tensor(float(updates), device=own.device)
            moments = {moment: torch.zeros_like(own, requires_grad=False) for moment in MOMENTS}
            self.optimizer.state[own] = {"step": step, **moments}
            for name, (start, end) in zip(bucket.names, bucket.bounds, strict=True):
                first, last = max(start, bucket.at), min(end, bucket.at + len(own))
                if first < last and name in there:
                    for moment in MOMENTS:
                        whole = torch.empty(self.parameters[name].shape)
                        part = whole.flatten()[first - start : last - start]
                        self._wanted.append((moments[moment][first - bucket.at : last - bucket.at], part))
                        yield moment, name, whole

    def restored(self) -> None:
        for target, part in self._wanted:
            target.copy_(part)
        self._wanted = []
        for bucket in self.buckets:
            bucket.halves.copy_(bucket.values)
        self._whole = True


class _Gathered(nn.Module):
    """The model with the values that were handed out, each awaited where the forward pass comes to it."""

    def __init__(self, lm: MaskedLM, sharded: Sharded):
        super().__init__()
        self.lm, self._sharded = lm, (sharded,)

    def forward(self, *args):
        (sharded,) = self._sharded
        self.lm.esm.before_layer = sharded.arrive
        try:
            if sharded.dtype == torch.float32:
                return self.lm(*args)
            cast = {f"esm.{name}": leaf for name, leaf in sharded.leaves.items()}
            for name, parameter in self.lm.named_parameters():
                if name not in cast:
                    cast[name] = parameter.to(sharded.dtype)
            return functional_call(self.lm, cast, args, tie_weights=True)
        finally:
            self.lm.esm.before_layer = None
            sharded.arrive()


def _cut(recipe: Recipe, parameters: dict[str, nn.Parameter]) -> list[list[str]]:
    """Names bucket by bucket, in the order in which the forward pass comes to them; of one decay each."""
    buckets: list[list[str]] = []
    for wanted in (False, True):
        size = _BUCKET
        for name, parameter in parameters.items():
            if decays(recipe, parameter) == wanted:
                if size + parameter.numel() > _BUCKET:
                    buckets.append([])
                    size = 0
                buckets[-1].append(name)
                size += parameter.numel()
    return buckets


_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def _summed(values: torch.Tensor, own: torch.Tensor) -> Callable[[], None]:
    """Starts to sum a buffer over the processes, to each its share, which is `own`, a part of it; the result waits."""
    if dist.get_backend() != "gloo":
        total = torch.empty_like(own)
        work = _REDUCE_SCATTER(total, values, async_op=True)

        def wait() -> None:
            work.wait()
            own.copy_(total)

        return wait
    # Gloo's own sends everything to everyone; this sends each share once, and sums in the order of ranks.
    parts = torch.empty_like(values)
    work = dist.all_to_all_single(parts, values, async_op=True)

    def wait_and_add() -> None:
        work.wait()
        torch.sum(parts.view(-1, len(own)), 0, out=own)

    return wait_and_add
