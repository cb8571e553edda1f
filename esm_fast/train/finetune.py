"""Fine-tuning: a linear head for sequences or residues, and as much of the model under it as is wanted."""

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .. import ops, weights
from ..files.atomic import atomic
from ..models.encoder import Encoder
from ..sequences.batching import PackedBatch, pack, plan
from . import adapters
from .examples import LEVELS, SPLITS, TASKS, Example, Targets, encode

LEARNING_RATES = {"frozen": 1e-2, "full": 2e-5, "lora": 5e-4}
_MODEL, _HEAD, _ABOUT = "model.safetensors", "head.safetensors", "finetune.json"


@dataclass(frozen=True)
class Settings:
    """trained: "frozen", the head alone; "full", everything; "lora", the head and low-rank adapters of `rank`.

    learning_rate: None for that of LEARNING_RATES. patience: epochs without a better held-out loss before it stops.
    batch_tokens: in an update.
    """

    task: str
    level: str = "sequence"
    trained: str = "frozen"
    epochs: int = 30
    patience: int = 3
    learning_rate: float | None = None
    rank: int = 8
    batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self):
        for name, allowed in {"task": TASKS, "level": LEVELS, "trained": tuple(LEARNING_RATES)}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(allowed)}")
        for name in ("epochs", "patience", "rank", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; give a number above 0")


class Predictor(nn.Module):
    """A model and its head. `targets` says what the head's outputs mean."""

    def __init__(self, esm: Encoder, targets: Targets):
        super().__init__()
        self.esm, self.targets = esm, targets
        self.head = nn.Linear(esm.config.embed_dim, targets.outputs, device=esm.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, batch: PackedBatch) -> torch.Tensor:
        """(sequences, width), the mean over each one's residues, or (all residues, width); fp32."""
        depth = self.esm.config.layers
        rows = self.esm.forward_packed(batch, layers=(depth,)).representations[depth]
        share = _residue_share(batch)
        if self.targets.level == "residue":
            return rows[share > 0]
        return ops.pool(rows, batch.cu_seqlens, share, backend=self.esm.backend)

    @torch.inference_mode()
    def predict(self, sequences: Sequence[str], batch_tokens: int = 4096) -> list:
        """For each sequence its class or number; at the residue level a list of them.

        Raises ExamplesError for letters or lengths that the model does not take.
        """
        examples = [Example(f"sequence {i}", text.upper(), "", "test") for i, text in enumerate(sequences, start=1)]
        encoded, found = encode(examples, self.esm.config.max_residues), [None] * len(sequences)
        for batch in _batches(encoded, list(range(len(encoded))), batch_tokens):
            features = self.features(batch.to(self.esm.device)).split(self._rows(batch))
            for index, rows in zip(batch.order.tolist(), features, strict=True):
                values = self._values(self.head(rows))  # each by itself: its neighbours change no bit of it
                found[index] = values if self.targets.level == "residue" else values[0]
        return found

    def _rows(self, batch: PackedBatch) -> list[int]:
        return (batch.lengths - 2).tolist() if self.targets.level == "residue" else [1] * len(batch)

    def _values(self, rows: torch.Tensor) -> list:
        if self.targets.task == "classification":
            return [self.targets.classes[number] for number in rows.argmax(1).tolist()]
        return (rows[:, 0] * self.targets.spread + self.targets.mean).tolist()

    def save(self, folder: str | Path, about: dict | None = None) -> None:
        """Writes the model, which `esm_fast.load` and `esm-fast embed` read, the head, and what it means."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights.save(self.esm, folder / _MODEL)
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()}
        with atomic(folder / _HEAD, durable=False) as temporary:
            save_file(head, temporary)
        with atomic(folder / _ABOUT, durable=False) as temporary:
            temporary.write_text(json.dumps({"targets": asdict(self.targets)} | (about or {}), indent=1) + "\n")


def written(folder: str | Path) -> list[Path]:
    """The files that `Predictor.save` would replace there. Raises OSError where it could write none."""
    folder = Path(folder)
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {folder.parent} does not exist; make it first")
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder for the predictor")
    if not os.access(folder if folder.is_dir() else folder.absolute().parent, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to")
    return [folder / name for name in (_MODEL, _HEAD, _ABOUT) if os.path.lexists(folder / name)]


def load_predictor(folder: str | Path) -> Predictor:
    """What `finetune` or `Predictor.save` wrote, in fp32 on the CPU."""
    folder = Path(folder)
    about = json.loads((folder / _ABOUT).read_text())["targets"]
    esm = weights.build(weights.read(folder / _MODEL))
    predictor = Predictor(esm, Targets(**about | {"classes": tuple(about["classes"])}))
    predictor.head.load_state_dict(load_file(folder / _HEAD))
    return predictor.eval()


def finetune(
    esm: Encoder,
    examples: Sequence[Example],
    settings: Settings,
    on_epoch: Callable[[dict], None] = lambda entry: None,
) -> tuple[Predictor, dict]:
    """Trains until the held-out loss has not fallen for a while, and returns the best predictor and its metrics.

    esm: in fp32; it is changed in place unless it stays frozen. on_epoch gets each epoch's number and losses. The
    losses are cross-entropies in nats, or mean squares in units of the labels' variance.
    Raises ExamplesError for examples that cannot be used.
    """
    return _Run(esm, examples, settings).train(on_epoch)


class _Run:
    def __init__(self, esm: Encoder, examples: Sequence[Example], settings: Settings):
        self.settings = settings
        self.parts = {split: [i for i, e in enumerate(examples) if e.split == split] for split in SPLITS}
        for split in ("train", "valid"):
            if not self.parts[split]:
                raise ValueError(f"no example is for {split!r}; give more, or a column split")
        self.encoded = encode(examples, esm.config.max_residues)
        targets = Targets.fit(settings.task, settings.level, [examples[i] for i in self.parts["train"]])
        self.wanted = [targets.encode(e, len(ids)) for e, ids in zip(examples, self.encoded, strict=True)]
        self.predictor = Predictor(esm, targets)
        if settings.trained == "lora":
            adapters.add(esm, settings.rank)
        else:
            esm.requires_grad_(settings.trained == "full")
            esm.lm_head.requires_grad_(False)
            esm.contact_head.requires_grad_(False)
            if settings.trained == "full":  # the projection of lm_head is this very table
                esm.embed_tokens.requires_grad_(True)
        self.frozen: dict[int, torch.Tensor] = {}  # features that never change
        trained = [p for p in self.predictor.parameters() if p.requires_grad]
        own = settings.learning_rate
        rate = LEARNING_RATES[settings.trained] if own is None else own
        self.optimizer = torch.optim.Adam(trained, lr=rate)
        self.generator = np.random.default_rng(settings.seed)

    def train(self, on_epoch: Callable[[dict], None]) -> tuple[Predictor, dict]:
        best, best_loss, worse = None, math.inf, 0
        for epoch in range(1, self.settings.epochs + 1):
            train_loss = self._epoch()
            valid_loss, metrics = self._evaluate("valid")
            on_epoch({"epoch": epoch, "train_loss": train_loss, "valid_loss": valid_loss} | metrics)
            if not math.isfinite(valid_loss):
                raise FloatingPointError(f"epoch {epoch}: the loss is {valid_loss}; lower the learning rate")
            worse += 1
            if valid_loss < best_loss:
                best_loss, worse = valid_loss, 0
                best = epoch, copy.deepcopy(self._trained())
            if worse == self.settings.patience:
                break
        number, state = best
        self.predictor.load_state_dict(state, strict=False)
        report = {"settings": asdict(self.settings), "best_epoch": number, "epochs": epoch}
        for split in [split for split in SPLITS[1:] if self.parts[split]]:
            loss, metrics = self._evaluate(split)
            report[split] = {"loss": loss} | metrics
        if self.settings.trained == "lora":
            adapters.merge(self.predictor.esm)
        return self.predictor.eval(), report

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.predictor.named_parameters() if p.requires_grad}

    def _epoch(self) -> float:
        total = count = 0
        batches = list(self._batches("train"))
        for number in self.generator.permutation(len(batches)):
            self.optimizer.zero_grad(set_to_none=True)
            loss, known = self.predictor.targets.loss(*self._outputs(batches[number]))
            if known:
                (loss / known).backward()
                self.optimizer.step()
            total, count = total + float(loss.detach()), count + known
        return total / max(count, 1)

    @torch.no_grad()
    def _evaluate(self, split: str) -> tuple[float, dict[str, float]]:
        pairs = [self._outputs(batch) for batch in self._batches(split)]
        predicted, wanted = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        loss, known = self.predictor.targets.loss(predicted, wanted)
        return float(loss) / max(known, 1), self.predictor.targets.metrics(predicted, wanted)

    def _batches(self, split: str) -> Iterator[PackedBatch]:
        return _batches(self.encoded, self.parts[split], self.settings.batch_tokens)

    def _outputs(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's outputs for a batch, and what they should be."""
        indices, device = batch.order.tolist(), self.predictor.esm.device
        wanted = torch.cat([self.wanted[i] for i in indices]).to(device)
        if self.settings.trained != "frozen":
            return self.predictor.head(self.predictor.features(batch.to(device))), wanted
        if any(i not in self.frozen for i in indices):
            with torch.no_grad():
                rows = self.predictor.features(batch.to(device)).split(self.predictor._rows(batch))
            self.frozen |= dict(zip(indices, rows, strict=True))
        return self.predictor.head(torch.cat([self.frozen[i] for i in indices])), wanted


def _batches(encoded: list[np.ndarray], indices: list[int], batch_tokens: int) -> Iterator[PackedBatch]:
    """Packed batches of the sequences `indices`, which their `order` holds; of nearly equal lengths."""
    lengths = np.array([len(encoded[i]) for i in indices])
    for part in plan(lengths + 2, batch_tokens):
        chosen = [indices[i] for i in part]
        ids, own = np.concatenate([encoded[i] for i in chosen]), lengths[part]
        batch = pack(ids, np.cumsum(own) - own, own, np.arange(len(part)))
        yield PackedBatch(
            batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen, torch.tensor(chosen, dtype=torch.int64)
        )


def _residue_share(batch: PackedBatch) -> torch.Tensor:
    """(n,): 1 / residues on each residue, 0 on <cls> and <eos>."""
    lengths = batch.lengths
    share = torch.repeat_interleave(1.0 / (lengths - 2).clamp(min=1), lengths)
    ends = batch.cu_seqlens.long()
    share[ends[:-1]] = 0
    share[ends[1:] - 1] = 0
    return share
