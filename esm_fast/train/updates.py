"""What makes an update of the parameters: every process of all of them, or each of its share (`sharded`)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .model import InPrecision, MaskedLM
from .processes import Processes
from .recipe import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")


class Replicated:
    """Adam on all parameters, in every process; the gradients are summed over them by DDP, as the backward pass goes.

    parameters: those that are trained, by name. model: to be called in a step, in the recipe's precision.
    """

    def __init__(self, recipe: Recipe, lm: MaskedLM, parameters: dict[str, nn.Parameter], processes: Processes):
        self.parameters, self.processes = parameters, processes
        self.model: nn.Module = InPrecision(lm, getattr(torch, recipe.precision))
        if processes.world > 1:
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(list(_groups(recipe, parameters)), **options(recipe))
        # What the loss is multiplied by, that the sum over the processes is one: DDP averages.
        self.factor = processes.world

    def begin(self) -> None:
        """Before the first batch of a step."""
        self.optimizer.zero_grad(set_to_none=True)

    def batch(self, *, last: bool) -> AbstractContextManager:
        """Around the passes over a batch of this process; with the last one gradients are summed over the processes."""
        return nullcontext() if last or self.processes.world == 1 else self.model.no_sync()

    @property
    def _grads(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.parameters.values()]

    def norm(self) -> torch.Tensor:
        """Of the whole gradient, once all batches are done: float64 (), on the device, in all processes."""
        return torch.nn.utils.get_total_norm(self._grads).double()

    def step(self, rate: torch.Tensor, factor: torch.Tensor | None, bad: torch.Tensor) -> None:
        """An update, see `stepped`."""
        stepped(self.optimizer, self._grads, rate, factor, bad)

    def whole(self) -> None:
        """Makes the model's own parameters those of the last update."""

    # ---- for checkpoints

    def held(self, names: list[str], *, copy: bool = False) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(moment, parameter, tensor) of these parameters. copy: in host memory, so that what is held may change."""
        for name in names:
            parameter = self.parameters[name]
            for moment in MOMENTS if parameter in self.optimizer.state else ():
                tensor = self.optimizer.state[parameter][moment]
                yield moment, name, tensor.to("cpu", copy=True) if copy else tensor

    def wanted(self, there: set[str], updates: int) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(moment, parameter, tensor to be filled) of the parameters whose moments are `there`; of others they go."""
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            if name in there:
                moments = {moment: torch.empty_like(parameter, requires_grad=False) for moment in MOMENTS}
                step = torch.tensor(float(updates), device=parameter.device)
                self.optimizer.state[parameter] = {"step": step, **moments}
        yield from self.held(list(self.parameters))

    def restored(self) -> None:
        """After the parameters and what was `wanted` were filled."""


def stepped(
    optimizer: torch.optim.Optimizer,
    grads: list[torch.Tensor],
    rate: torch.Tensor,
    factor: torch.Tensor | None,
    bad: torch.Tensor,
) -> None:
    """An update, or none where `bad`, bool (). factor: what the gradients are multiplied by first, None for 1."""
    if factor is not None:
        torch._foreach_mul_(grads, factor.float())
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.found_inf = bad.float()
    optimizer.step()


def options(recipe: Recipe) -> dict:
    return dict(lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, fused=True)


def decays(recipe: Recipe, parameter: torch.Tensor) -> bool:
    return bool(recipe.weight_decay) and (recipe.decay == "all" or parameter.ndim > 1)


def _groups(recipe: Recipe, parameters: dict[str, nn.Parameter]) -> Iterator[dict]:
    for wanted in (True, False):
        group = [p for p in parameters.values() if decays(recipe, p) == wanted]
        if group:
            yield {"params": group, "weight_decay": recipe.weight_decay if wanted else 0.0}
