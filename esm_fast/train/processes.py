"""The processes of a run: one, or those `torchrun` started."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """group: through which they exchange, None for that of all that they do one after the other."""

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    def beside(self) -> "Processes":
        """The same, for another thread, whose exchanges nothing else gets mixed up with. All call this."""
        return self if self.world == 1 else replace(self, group=dist.new_group(backend="gloo"))

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums of values over all processes."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return total.tolist()

    def sum_beside(self, value: float) -> Callable[[], float]:
        """Begins a sum in host memory, through a group of gloo's (`beside`); what it returns waits for it."""
        total = torch.tensor(value, dtype=torch.float64)
        coming = dist.all_reduce(total, group=self.group, async_op=True)

        def summed() -> float:
            coming.wait()
            return float(total)

        return summed

    def any(self, value: bool) -> bool:
        """Whether it is true in any of them."""
        return self.sum(float(value))[0] > 0

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Makes each gradient the sum over all processes; one that is missing counts as 0."""
        if self.world == 1:
            return
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))

    def divided(self, items: Sequence, make: Callable[[list], list]) -> list:
        """make(items), item by item, of which each process makes its share."""
        if self.world == 1:
            return list(make(list(items))) if len(items) else []
        mine, found = list(items[self.rank :: self.world]), [None] * len(items)
        for rank, part in enumerate(self.gather(list(make(mine)) if mine else [])):
            found[rank :: self.world] = part
        return found

    def gather(self, value) -> list:
        """Every process's value, in order of rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.group)


ALONE = Processes(0, 1, torch.device("cpu"))


@contextmanager
def joined() -> Iterator[Processes]:
    """Joins the group that torchrun's environment describes; without one, a process alone."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world == 1:
        yield Processes(0, 1, device)
        return
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # A torchrun that restarts its processes may keep the store, with the addresses of those that are gone: the new
        # ones waited for them. Of several machines torchrun counts restarts apart, and makes a new store for each.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world)
    try:
        yield Processes(rank, world, device)
        _part(dist.PrefixStore("part", store), rank, world)
    finally:
        dist.destroy_process_group()


def _part(store: dist.Store, rank: int, world: int) -> None:
    """Waits until all processes are done with their last exchange. A barrier would not do: who leaves it first closes
    connections in which others, held up, have not read the last bytes yet, and these then fail.

    The store itself is in the first process where no torchrun keeps it, so that one leaves when no other asks it
    anything more: `set` awaits no answer.
    """
    if store.add("done", 1) == world:
        store.set("all", "done")
    store.wait(["all"])
    if rank == 0:
        store.wait(["left"])
    elif store.add("leaving", 1) == world - 1:
        store.set("left", "all")
