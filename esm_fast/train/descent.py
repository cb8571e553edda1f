"""Fine-tuning by gradient descent: AdamW (Loshchilov and Hutter 2019) over random batches, warm-up, early stopping."""

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from ..sequences.batching import PackedBatch, consecutive, pack
from . import metrics
from .labelled import Labelled
from .model import InPrecision
from .parts import moments
from .predictor import Predictor

_WARMUP = 0.1  # of all updates
_CLIP = 1.0  # largest norm of the gradient


class Standardised(nn.Module):
    """A linear head on features of mean 0 and spread 1, as they were at the start; all its weights move alike."""

    def __init__(self, predictor: Predictor, features: np.ndarray):
        super().__init__()
        mean, spread = (torch.from_numpy(x).float().to(predictor.esm.device) for x in moments(features))
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)
        head = predictor.head
        self.weight = nn.Parameter(head.weight.detach() * spread)
        self.bias = nn.Parameter(head.bias.detach() + head.weight.detach() @ mean)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear((rows - self.mean) / self.spread, self.weight, self.bias)

    @torch.no_grad()
    def write_to(self, head: nn.Linear) -> None:
        """The same head for features as they are."""
        head.weight.copy_(self.weight / self.spread)
        head.bias.copy_(self.bias - head.weight @ self.mean)


class _Pass(nn.Module):
    """A layer's representation as a module, which `InPrecision` can run."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.esm, self.layer = predictor.esm, predictor.layer

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        return self.esm.forward_packed(batch, layers=(self.layer,)).representations[self.layer]


class Descent:
    """features: (all rows, width) of the frozen model, at the predictor's layer."""

    def __init__(self, predictor: Predictor, data: Labelled, features: np.ndarray, settings):
        self.predictor, self.data, self.settings = predictor, data, settings
        self.frozen = torch.from_numpy(features) if settings.trained == "frozen" else None
        self.train_set = data.of("train")
        train = data.part(features, self.train_set)
        self.head = Standardised(predictor, train.rows)
        weights = data.targets.class_weights(train.wanted, settings.class_weights == "balanced")
        self.class_weights = [w if w is None else w.to(predictor.esm.device) for w in weights]
        self.labels = int((~np.isnan(train.wanted)).sum())
        self.encoder = InPrecision(_Pass(predictor), getattr(torch, settings.precision))
        self.generator = np.random.default_rng(settings.seed)
        self.trained = {n: p for n, p in predictor.esm.named_parameters() if p.requires_grad}
        self.optimizer = self._optimizer()

    def run(self, on_epoch: Callable[[dict], None], on_batch: Callable[[int], None]) -> dict:
        """Trains until the held-out loss has not fallen for a while, and leaves the best in the predictor."""
        settings, best_epoch, worse = self.settings, 0, 0
        best_loss, _ = self._valid()
        best = self._state()
        for epoch in range(1, settings.epochs + 1):
            train_loss = self._epoch(epoch, on_batch)
            self.head.write_to(self.predictor.head)
            valid_loss, scores = self._valid()
            on_epoch({"epoch": epoch, "train_loss": train_loss, "valid_loss": valid_loss} | scores)
            if not math.isfinite(valid_loss):
                raise FloatingPointError(f"epoch {epoch}: the loss is {valid_loss}; lower the learning rate")
            worse += 1
            if valid_loss < best_loss:
                best_loss, best_epoch, worse, best = valid_loss, epoch, 0, self._state()
            if worse == settings.patience:
                break
        self.predictor.load_state_dict(best, strict=False)
        return {"best_epoch": best_epoch, "epochs": epoch}

    def _state(self) -> dict:
        own = {f"esm.{name}": p for name, p in self.trained.items()}
        own |= {f"head.{name}": p for name, p in self.predictor.head.named_parameters()}
        return copy.deepcopy({name: p.detach() for name, p in own.items()})

    def _optimizer(self) -> torch.optim.Optimizer:
        """Matrices decay, biases and gains do not; the head has a rate of its own."""
        settings, matrices = self.settings, [p for p in self.trained.values() if p.ndim > 1]
        vectors = [p for p in self.trained.values() if p.ndim < 2]
        rate, head_rate = settings.rates(self.predictor.esm.config.embed_dim)
        groups = [
            {"params": matrices, "lr": rate, "weight_decay": settings.weight_decay},
            {"params": vectors, "lr": rate, "weight_decay": 0.0},
            {"params": [self.head.weight], "lr": head_rate, "weight_decay": settings.weight_decay},
            {"params": [self.head.bias], "lr": head_rate, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
        return optimizer

    def _epoch(self, epoch: int, on_batch: Callable[[int], None]) -> float:
        """Every label counts alike: the sum over a batch is divided by the mean number of labels of a batch."""
        batches, total = list(self._random()), 0.0
        share = len(batches) / max(self.labels, 1)
        for number, chosen in enumerate(batches):
            self._set_rate((epoch - 1) * len(batches) + number, self.settings.epochs * len(batches))
            self.optimizer.zero_grad(set_to_none=True)
            wanted = torch.from_numpy(np.concatenate([self.data.wanted[i] for i in chosen]))
            outputs = self.head(self._features(chosen))
            loss, known = self.data.targets.loss(outputs, wanted.to(outputs.device), self.class_weights)
            if known:
                (loss * share).backward()
                parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                norm = nn.utils.clip_grad_norm_(parameters, _CLIP)
                if torch.isfinite(norm):
                    self.optimizer.step()
                else:
                    raise FloatingPointError(f"epoch {epoch}: the gradient is not finite; lower the learning rate")
            total += float(loss.detach())
            on_batch(int(self.data.tokens.lengths[chosen].sum()))
        return total / max(self.labels, 1)

    def _set_rate(self, step: int, steps: int) -> None:
        """Linearly up over a tenth of all updates, then linearly to 0."""
        warmup = max(1, int(_WARMUP * steps))
        factor = (step + 1) / warmup if step < warmup else (steps - step) / max(steps - warmup, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _random(self) -> Iterator[list[int]]:
        """The training examples in a new order, cut into batches; they need no equal lengths, being packed."""
        return batches(self.generator.permutation(self.train_set), self.data.tokens.lengths, self.settings.batch_tokens)

    def _features(self, chosen: list[int]) -> torch.Tensor:
        device = self.predictor.esm.device
        if self.frozen is not None:
            bounds = self.data.rows
            return torch.cat([self.frozen[bounds[i] : bounds[i + 1]] for i in chosen]).to(device)
        packed = packed_of(self.data, chosen).to(device)
        return self.predictor.features(packed, self.encoder(packed).float())

    def _valid(self) -> tuple[float, dict]:
        outputs, wanted = self.outputs("valid")
        loss, count = self.data.targets.loss(torch.from_numpy(outputs), torch.from_numpy(wanted))
        return float(loss) / max(count, 1), metrics.quick(self.data.targets, outputs, wanted)

    def outputs(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The head's outputs for a split's examples, as they will be predicted, and what they should be."""
        numbers = self.data.of(split)
        if self.frozen is not None:
            part = self.data.part(self.frozen.numpy(), numbers)
            with torch.no_grad():
                head = self.predictor.head
                return head(torch.from_numpy(part.rows).to(head.weight.device)).cpu().numpy(), part.wanted
        made = self.predictor.outputs([self.data.only(numbers)], window=self.data.policy.window)
        return np.concatenate([array for _, (array,) in made]), np.concatenate([self.data.wanted[i] for i in numbers])


def batches(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> Iterator[list[int]]:
    """Consecutive examples of at most `batch_tokens` together, or a single one; lengths: residues."""
    return consecutive(order.tolist(), lambda number: int(lengths[number]) + 2, batch_tokens)


def packed_of(data: Labelled, chosen: list[int]) -> PackedBatch:
    """The examples in one packed batch, in this order."""
    offsets = data.tokens.offsets
    starts, lengths = offsets[chosen], data.tokens.lengths[chosen]
    return pack(data.tokens.ids, starts, lengths, np.arange(len(chosen)))
