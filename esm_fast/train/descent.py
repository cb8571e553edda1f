"""Fine-tuning by gradient descent: AdamW (Loshchilov and Hutter 2019) over random batches, warm-up, early stopping."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from ..sequences.batching import PackedBatch, consecutive, pack
from . import metrics
from .batches import balanced
from .begun import Begun
from .heads import Standardised
from .labelled import Labelled
from .model import InPrecision
from .parts import moments
from .predictor import Predictor
from .processes import ALONE, Processes
from .running import Stopped
from .updates import MOMENTS

_WARMUP = 0.1  # of all updates
_CLIP = 1.0  # largest norm of the gradient
_STATE = ("step", *MOMENTS)  # of an optimiser, a parameter


class _Pass(nn.Module):
    """A layer's representation as a module, which `InPrecision` can run."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.esm, self.layer = predictor.esm, predictor.layer

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        return self.esm.forward_packed(batch, layers=(self.layer,)).representations[self.layer]


class Descent:
    """features: (all rows, width) of the frozen model at the predictor's layer, of residues where the head is of them.

    Every process has all examples; they divide the batches, and each makes the same update.
    """

    def __init__(
        self, predictor: Predictor, data: Labelled, features: np.ndarray, settings, processes: Processes = ALONE
    ):
        self.predictor, self.data, self.settings, self.processes = predictor, data, settings, processes
        self.rows = data.rows_of(predictor.of_residues)
        self.counts, self.lengths = np.diff(self.rows), data.lengths  # rows, and residues, of each example
        self.sizes = self.lengths + 2 * (data.proteins.shape[1] - 1)  # with the tokens between the proteins of a pair
        self.frozen = torch.from_numpy(features) if settings.trained == "frozen" else None
        self.train_set = data.of("train")
        at = np.concatenate([np.arange(self.rows[n], self.rows[n + 1]) for n in self.train_set])
        self.head = Standardised(predictor.head, *moments(features[at]))
        wanted = data.wanted_of(self.train_set)
        weights = data.targets.class_weights(wanted, settings.class_weights == "balanced")
        self.class_weights = [w if w is None else w.to(predictor.esm.device) for w in weights]
        self.labels = int((~np.isnan(wanted)).sum())
        self.encoder = InPrecision(_Pass(predictor), getattr(torch, settings.precision))
        predictor.esm.recompute = settings.recompute
        self.generator = np.random.default_rng(settings.seed)
        self.trained = {n: p for n, p in predictor.esm.named_parameters() if p.requires_grad}
        self.optimizer = self._optimizer()
        # Where it stands: in epoch `epoch`, whose examples come in `order`, `batch` batches are done.
        self.epoch, self.batch, self.order, self.total = 1, 0, np.zeros(0, np.int64), 0.0
        self.entries: list[dict] = []
        self.best_loss, self.best_epoch, self.worse, self.best = math.inf, 0, 0, self._state()

    def run(
        self,
        on_epoch: Callable[[dict], None],
        on_batch: Callable[[int], None],
        on_stage: Callable[[str, int], None],
        begun: Begun | None = None,
    ) -> dict:
        """Trains until the held-out loss has not fallen for a while, and leaves the best in the predictor.

        begun: resumes from there, and writes it after each epoch and every ten minutes. Raises FloatingPointError,
        BegunError, Stopped.
        """
        if not self._resume(begun):
            self.best_loss, _ = self._valid()
        on_stage("training", self._left())
        while self.epoch <= self.settings.epochs and self.worse < self.settings.patience:
            train_loss = self._epoch(on_batch, begun)
            self.head.write_to(self.predictor.head)
            valid_loss, scores = self._valid()
            if not math.isfinite(valid_loss):
                raise FloatingPointError(f"epoch {self.epoch}: the loss is {valid_loss}; lower the learning rate")
            self.entries.append({"epoch": self.epoch, "train_loss": train_loss, "valid_loss": valid_loss} | scores)
            on_epoch(self.entries[-1])
            self.worse += 1
            if valid_loss < self.best_loss:
                self.best_loss, self.best_epoch, self.worse, self.best = valid_loss, self.epoch, 0, self._state()
            self.epoch, self.batch, self.total = self.epoch + 1, 0, 0.0
            self._save(begun)
        self.predictor.load_state_dict(self.best, strict=False)
        self.predictor.esm.recompute = False
        return {"best_epoch": self.best_epoch, "epochs": len(self.entries), "curve": self.entries}

    def _left(self) -> int:
        """Residues of all epochs that may come; of one that resumes, the batches that are done are not taken off."""
        return (self.settings.epochs + 1 - self.epoch) * int(self.lengths[self.train_set].sum())

    # ---- what is kept

    def _state(self) -> dict:
        own = {f"esm.{name}": p for name, p in self.trained.items()}
        own |= {f"head.{name}": p for name, p in self.predictor.head.named_parameters()}
        return {name: p.detach().clone() for name, p in own.items()}

    def _moving(self) -> dict[str, nn.Parameter]:
        return {f"esm.{n}": p for n, p in self.trained.items()} | dict(self.head.named_parameters())

    def _save(self, begun: Begun | None) -> None:
        if begun is None:
            return
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self._moving().items():
            tensors[f"now/{name}"] = parameter
            for moment, tensor in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{moment}/{name}"] = tensor
        tensors["order"] = torch.from_numpy(self.order)
        state = {name: getattr(self, name) for name in ("epoch", "batch", "best_epoch", "worse", "entries")}
        # As hexadecimal, which JSON keeps to the last bit, infinity too.
        state |= {"best_loss": self.best_loss.hex(), "total": self.total.hex()}
        begun.save(tensors, state | {"generator": self.generator.bit_generator.state})
        if self.processes.any(len(begun.asked) > 0):
            raise Stopped(f"stopped in epoch {self.epoch} and saved; the same command resumes")

    def _resume(self, begun: Begun | None) -> bool:
        found = begun.load() if begun is not None else None
        if found is None:
            return False
        tensors, state = found
        moving = self._moving()
        with torch.no_grad():
            for name, parameter in moving.items():
                parameter.copy_(tensors[f"now/{name}"])
                if f"step/{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        key: tensors[f"{key}/{name}"].to("cpu" if key == "step" else parameter.device) for key in _STATE
                    }
        self.best = {name: tensors[f"best/{name}"].to(tensor.device) for name, tensor in self.best.items()}
        for name in ("epoch", "batch", "best_epoch", "worse", "entries"):
            setattr(self, name, state[name])
        self.best_loss, self.total = float.fromhex(state["best_loss"]), float.fromhex(state["total"])
        self.generator.bit_generator.state = state["generator"]
        self.order = tensors["order"].numpy()
        return True

    # ---- updates

    def _optimizer(self) -> torch.optim.Optimizer:
        """Matrices decay, biases and gains do not; the head has a rate of its own."""
        settings, matrices = self.settings, [p for p in self.trained.values() if p.ndim > 1]
        vectors = [p for p in self.trained.values() if p.ndim < 2]
        rate, head_rate = settings.rates(self.predictor.esm.config.embed_dim)
        own = list(self.head.parameters())
        groups = [
            {"params": matrices, "lr": rate, "weight_decay": settings.weight_decay},
            {"params": vectors, "lr": rate, "weight_decay": 0.0},
            {"params": [p for p in own if p.ndim > 1], "lr": head_rate, "weight_decay": settings.weight_decay},
            {"params": [p for p in own if p.ndim < 2], "lr": head_rate, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
        return optimizer

    def _epoch(self, on_batch: Callable[[int], None], begun: Begun | None) -> float:
        """Every label counts alike: the sum over a batch is divided by the mean number of labels of a batch."""
        if not self.batch:
            self.order = self.generator.permutation(self.train_set).astype(np.int64)
        cut = list(batches(self.order, self.sizes, self.settings.batch_tokens))
        share = len(cut) / max(self.labels, 1)
        for number in range(self.batch, len(cut)):
            self._set_rate((self.epoch - 1) * len(cut) + number, self.settings.epochs * len(cut))
            self.total += self._update(cut[number], share)
            self.batch = number + 1
            on_batch(int(self.lengths[cut[number]].sum()))
            if begun is not None and self.batch < len(cut) and self.processes.any(begun.due):
                self._save(begun)
        return self.total / max(self.labels, 1)

    def _update(self, chosen: list[int], share: float) -> float:
        """Returns the sum of the batch's losses, over all processes."""
        self.optimizer.zero_grad(set_to_none=True)
        own, lost = self._own(chosen), 0.0
        if own:
            wanted = torch.from_numpy(self.data.wanted_of(own))
            outputs = self.head(*self._features(own))
            loss, known = self.data.targets.loss(outputs, wanted.to(outputs.device), self.class_weights)
            if known:
                (loss * share).backward()
            lost = float(loss.detach())
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.processes.sum_gradients(parameters)
        if any(not np.isnan(self.data.wanted[i]).all() for i in chosen):
            if not torch.isfinite(nn.utils.clip_grad_norm_(parameters, _CLIP)):
                raise FloatingPointError(f"epoch {self.epoch}: the gradient is not finite; lower the learning rate")
            self.optimizer.step()
        return self.processes.sum(lost)[0]

    def _own(self, chosen: list[int]) -> list[int]:
        """This process's share of a batch, balanced by residues."""
        if self.processes.world == 1:
            return chosen
        parts = balanced(self.sizes[chosen] + 2, self.processes.world)
        return [chosen[at] for at in parts[self.processes.rank].tolist()]

    def _set_rate(self, step: int, steps: int) -> None:
        """Linearly up over a tenth of all updates, then linearly to 0."""
        warmup = max(1, int(_WARMUP * steps))
        factor = (step + 1) / warmup if step < warmup else (steps - step) / max(steps - warmup, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _features(self, chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, their numbers in each example)."""
        device, bounds = self.predictor.esm.device, self.rows
        lengths = torch.from_numpy(self.counts[chosen]).to(device)
        if self.frozen is not None:
            return torch.cat([self.frozen[bounds[i] : bounds[i + 1]] for i in chosen]).to(device), lengths
        packed, index = packed_of(self.data, chosen)
        packed = packed.to(device)
        return self.predictor.features(packed, self.encoder(packed).float(), index), lengths

    # ---- held out

    def _valid(self) -> tuple[float, dict]:
        outputs, wanted = self.outputs("valid")
        loss, count = self.data.targets.loss(torch.from_numpy(outputs), torch.from_numpy(wanted))
        return float(loss) / max(count, 1), metrics.quick(self.data.targets, outputs, wanted)

    def outputs(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The head's outputs for a split's examples, as they will be predicted, and what they should be."""
        numbers = self.data.of(split)
        wanted = self.data.wanted_of(numbers)
        if self.frozen is not None:
            with torch.no_grad():
                return self.predictor.head(*self._features(numbers)).cpu().numpy(), wanted
        return np.concatenate(outputs_of(self.predictor, self.data, numbers, self.processes)), wanted


def outputs_of(predictor: Predictor, data: Labelled, numbers: list[int], processes: Processes) -> list[np.ndarray]:
    """What the predictor says of each of some examples, which the processes divide."""

    def made(own: list[int]) -> list[np.ndarray]:
        tokens, index = data.only(own)
        if predictor.pairs:
            return list(predictor.outputs_of_pairs([tokens], index, window=data.policy.window))
        return [array for _, (array,) in predictor.outputs([tokens], window=data.policy.window)]

    return processes.divided(numbers, made)


def batches(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> Iterator[list[int]]:
    """Consecutive examples of at most `batch_tokens` together, or a single one; lengths: residues."""
    return consecutive(order.tolist(), lambda number: int(lengths[number]) + 2, batch_tokens)


def packed_of(data: Labelled, chosen: list[int]) -> tuple[PackedBatch, np.ndarray]:
    """(the proteins of the examples in one packed batch, the numbers of each example's). Single proteins are in this
    order; of pairs each is there once."""
    own = data.proteins[chosen]
    if own.shape[1] == 1:
        used, index = own[:, 0], np.arange(len(own))[:, None]
    else:
        used, index = np.unique(own, return_inverse=True)
    batch = pack(data.tokens.ids, data.tokens.offsets[used], data.tokens.lengths[used], np.arange(len(used)))
    return batch, index.reshape(own.shape)
