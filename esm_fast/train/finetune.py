"""Fine-tuning: a linear head for sequences or residues, and as much of the model under it as is wanted."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..models.encoder import Encoder
from . import adapters, metrics
from .begun import Begun
from .descent import Descent, outputs_of
from .examples import SPLITS, Example
from .head import Solved, solve, solve_again
from .labelled import features_of, labelled_of
from .pairs import KINDS as PAIRS
from .predictor import Predictor
from .processes import ALONE, Processes
from .splits import turns
from .targets import LEVELS, TASKS

# Of the model at a width of 1,280; "full" grows as a model is narrower (Yang et al. 2022). The head's own beside it.
LEARNING_RATES = {"frozen": 1e-3, "full": 2e-5, "lora": 5e-4}
_HEAD_RATE = 1e-3
_WIDTH = 1280
PRECISIONS = ("float32", "bfloat16")
# How a head is found, and what it is: "mlp" and "attention" begin as the solved linear one (see `heads`).
HEADS = ("solved", "descent", "mlp", "attention")


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    trained: "frozen", the head alone; "full", everything; "lora", the head and low-rank adapters of `rank`. head:
    "solved" in closed form on the frozen model, from which training continues where the model is trained too;
    "descent", from 0 by AdamW; "mlp", a hidden layer of `hidden` beside the solved head, by AdamW; "attention", each
    output with a softmax of its own over the residues in place of their mean, likewise. layer: counted from the last
    where negative; "best": of all, the one with the lowest held-out loss. class_weights: "balanced", every class weighs
    alike, or "none". learning_rate, head_learning_rate: None for the defaults. patience: epochs without a better held-
    out loss before it stops. batch_tokens: in an update. precision: of the model's pass; parameters and head stay fp32.
    unknown, overlength: as for `embed`, "window" for frozen models only. multi_label: what is between the classes of a
    protein that has any number of them, such as ";"; "" where each has one. refit: the head of a frozen model that is
    kept is solved on training and validation part together, after the latter has chosen and been measured. missing:
    rows without any label, "error" or "skip". recompute: each layer again in the backward pass instead of keeping what
    is inside it. folds: cross validation beside the predictor, for frozen models; 0 for none. pairs: "ordered" or
    "symmetric", where each label is of two proteins (see `pairs`); "" of one.
    """

    task: str
    level: str = "sequence"
    trained: str = "frozen"
    head: str = "solved"
    hidden: int = 128
    layer: int | str = -1
    class_weights: str = "none"
    epochs: int = 10
    patience: int = 3
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    weight_decay: float = 0.01
    rank: int = 8
    batch_tokens: int = 4096
    precision: str = "float32"
    seed: int = 0
    unknown: str = "error"
    overlength: str = "error"
    missing: str = "error"
    folds: int = 0
    refit: bool = True
    recompute: bool = False
    multi_label: str = ""
    pairs: str = ""

    def __post_init__(self):
        choices = {"task": TASKS, "level": LEVELS, "trained": tuple(LEARNING_RATES), "head": HEADS}
        choices |= {"class_weights": ("none", "balanced"), "precision": PRECISIONS, "missing": ("error", "skip")}
        choices |= {"unknown": ("error", "x", "skip"), "overlength": ("error", "truncate", "window")}
        choices |= {"pairs": ("", *PAIRS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(allowed)}")
        for name in ("epochs", "patience", "rank", "batch_tokens", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("learning_rate", "head_learning_rate"):
            if (rate := getattr(self, name)) is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} is {rate}; give a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}; give a number from 0")
        if isinstance(self.layer, str) and self.layer != "best":
            raise ValueError(f"layer is {self.layer!r}; give a number, or 'best'")
        if self.folds and self.folds < 3:
            raise ValueError(f"folds is {self.folds}; give 3 or more (one tests, one chooses, the others train), or 0")
        if self.trained != "frozen" and self.overlength == "window":
            raise ValueError(f"overlength 'window' is for a frozen model, and trained is {self.trained!r}; truncate")
        if self.multi_label and (self.task, self.level) != ("classification", "sequence"):
            raise ValueError("multi_label is for the task 'classification' at the level 'sequence'")
        if self.head == "attention" and self.level == "residue":
            raise ValueError("head 'attention' makes one output of all residues, and level is 'residue'; take 'mlp'")
        if self.pairs and (self.level == "residue" or self.head == "attention"):
            raise ValueError("pairs have one label each, of the means of both proteins: level 'sequence', another head")
        if self.head == "attention" and self.overlength == "window":
            raise ValueError("head 'attention' is trained on whole proteins, and overlength is 'window'; truncate")
        if self.folds and (self.trained, self.head) != ("frozen", "solved"):
            raise ValueError("folds are for a frozen model with a solved head")

    @property
    def kind(self) -> str:
        """Of the head, see `heads`."""
        return self.head if self.head in ("mlp", "attention") else "linear"

    @property
    def descends(self) -> bool:
        """Whether anything is trained by steps."""
        return self.trained != "frozen" or self.head != "solved"

    def rates(self, width: int) -> tuple[float, float]:
        """(the model's, the head's) learning rates for a model of this width."""
        rate = LEARNING_RATES[self.trained] * (_WIDTH / width if self.trained == "full" else 1)
        rate = rate if self.learning_rate is None else self.learning_rate
        head = rate if self.trained == "frozen" else _HEAD_RATE
        return rate, head if self.head_learning_rate is None else self.head_learning_rate

    def layers(self, depth: int) -> list[int]:
        """Those to try. Raises ValueError."""
        if self.layer == "best":
            return list(range(depth + 1))
        if not -(depth + 1) <= self.layer <= depth:
            raise ValueError(f"layer {self.layer} does not exist: the model has 0 to {depth}, or -1 to {-depth - 1}")
        return [self.layer % (depth + 1)]


class HeldOut(NamedTuple):
    """A protein that was not trained on. ids: of its residues; outputs: the head's; wanted: see `Targets`; fold: ""
    outside folds."""

    example: Example
    ids: np.ndarray
    outputs: np.ndarray
    wanted: np.ndarray
    fold: str = ""


class Finetuned(NamedTuple):
    """report: settings, counts, warnings, and the metrics of each held-out split (and of all folds together)."""

    predictor: Predictor
    report: dict
    held_out: list[HeldOut]


def finetune(
    esm: Encoder,
    examples: Sequence[Example],
    settings: Settings,
    on_epoch: Callable[[dict], None] = lambda entry: None,
    *,
    on_batch: Callable[[int], None] = lambda residues: None,
    on_stage: Callable[[str, int], None] = lambda stage, residues: None,
    clusters=None,
    begun: Begun | None = None,
    processes: Processes = ALONE,
) -> Finetuned:
    """Trains a predictor, and keeps what has the lowest held-out loss.

    Args:
        esm: in fp32; it is changed in place unless it stays frozen.
        examples: see `read_examples`. Without splits a tenth is for validation and a tenth for testing.
        on_epoch: gets each epoch's number and losses; on_batch: the residues of a batch, as they are done.
        on_stage: is told what begins (features, training), and how many residues it takes, at most.
        clusters: name of an example -> its cluster; where splits are drawn, clusters are not divided.
        begun: where the training is kept as it goes, and from where it resumes.
        processes: that divide each batch; all call this, with the same arguments.

    Losses are cross-entropies in nats, or mean squares in units of the labels' variance. Raises ExamplesError for
    examples that cannot be used, FloatingPointError, ImportError; BegunError, Stopped.
    """
    return _Run(esm, examples, settings, clusters, (on_epoch, on_batch, on_stage), processes).train(begun)


class _Run:
    def __init__(self, esm: Encoder, examples, settings: Settings, clusters, told: tuple, processes):
        self.esm, self.settings, self.clusters = esm, settings, clusters
        (self.on_epoch, self.on_batch, self.on_stage), self.processes = told, processes
        self.layers = settings.layers(esm.config.layers)
        self.data = labelled_of(esm, examples, settings, clusters)

    def train(self, begun: Begun | None) -> Finetuned:
        settings, data = self.settings, self.data
        features, layer, solved = self._features()
        more = {"head": settings.kind, "hidden": settings.hidden, "pairs": settings.pairs}
        predictor = Predictor(self.esm, data.targets, layer, **more)
        report = {"settings": asdict(settings), "layer": layer, "warnings": data.warnings, "counts": self._counts()}
        if solved:
            predictor.set_head(solved.weight, solved.bias)
            report |= {"penalties": solved.penalties, "best_epoch": 0, "epochs": 0}
        if settings.descends:
            if predictor.of_residues and settings.level == "sequence":  # the solved head was of the means
                features = self._of_residues(layer)
            self._unfreeze()
            descent = Descent(predictor, data, features, settings, self.processes)
            report |= descent.run(self.on_epoch, self.on_batch, self.on_stage, begun)
        held_out = self._held_out(predictor, features, "valid")
        refit = settings.refit and not settings.descends
        if refit:
            again = self._solve_again(features, data.of("train") + data.of("valid"), solved)
            predictor.set_head(again.weight, again.bias)
        report["refit"] = refit
        held_out += self._held_out(predictor, features, "test")
        for split in SPLITS[1:]:
            if own := [one for one in held_out if one.example.split == split]:
                report[split] = self._scores(own)
        if settings.folds:
            crossed = self._cross_validate(features)
            report["folds"] = {"count": settings.folds} | self._scores(crossed)
            held_out += crossed
        predictor.adapters = adapters.found(self.esm)
        adapters.merge(self.esm)
        return Finetuned(predictor.eval(), report, held_out)

    def _counts(self) -> dict:
        data = self.data
        return {split: len(data.of(split)) for split in SPLITS} | {
            "left out without a label": data.left_out,
            "left out for an unknown residue": data.unknown,
            "unknown residues read as X": data.report.unknown if self.settings.unknown == "x" else 0,
            "truncated": data.report.truncated,
            "windowed": data.report.windowed,
        }

    def _encoder(self) -> Encoder:
        """What computes features of the frozen model."""
        settings = self.settings
        if settings.precision != "float32" and settings.trained == "frozen":
            return copy.deepcopy(self.esm).to(getattr(torch, settings.precision))
        return self.esm

    def _features(self) -> tuple[np.ndarray, int, Solved | None]:
        """Those of the chosen layer, and the head solved on them."""
        settings, model = self.settings, self._encoder()
        # Residues of all layers at once would fill the memory: layer by layer, then.
        groups = [self.layers] if settings.level == "sequence" else [[layer] for layer in self.layers]
        best = None
        self._tell_features(len(groups))
        for group in groups:
            for layer, own in features_of(model, self.data, group, None, self.on_batch).items():
                features = self.data.combined(own)
                if settings.head == "descent" and len(self.layers) == 1:
                    return features, layer, None
                solved = self._solve(features, self.data.of("train"), self.data.of("valid"))
                if best is None or solved.loss < best[2].loss:
                    best = features, layer, solved
        if not math.isfinite(best[2].loss):
            raise FloatingPointError(f"the loss is {best[2].loss}: the model's numbers are not finite")
        return (*best[:2], best[2] if settings.head != "descent" else None)

    def _of_residues(self, layer: int) -> np.ndarray:
        """The chosen layer's residues, as a head that looks at them needs them where the model is frozen."""
        self._tell_features(1)
        return features_of(self._encoder(), self.data, [layer], None, self.on_batch, of_residues=True)[layer]

    def _tell_features(self, passes: int) -> None:
        self.on_stage("features", passes * int(self.data.tokens.lengths.sum()))

    def _solve(self, features: np.ndarray, train: list[int], valid: list[int]) -> Solved:
        parts = [self.data.part(features, numbers) for numbers in (train, valid)]
        return solve(self.data.targets, *parts, balanced=self.settings.class_weights == "balanced")

    def _solve_again(self, features: np.ndarray, numbers: list[int], solved: Solved) -> Solved:
        balanced = self.settings.class_weights == "balanced"
        return solve_again(self.data.targets, self.data.part(features, numbers), solved, balanced=balanced)

    def _unfreeze(self) -> None:
        esm, trained = self.esm, self.settings.trained
        if trained == "lora":
            adapters.add(esm, self.settings.rank)
            return
        esm.requires_grad_(trained == "full")
        esm.lm_head.requires_grad_(False)
        esm.contact_head.requires_grad_(False)
        if trained == "full":  # the projection of lm_head is this very table
            esm.embed_tokens.requires_grad_(True)

    def _held_out(self, predictor: Predictor, features: np.ndarray, split: str) -> list[HeldOut]:
        """As the predictor says it, as it is now."""
        data, numbers = self.data, self.data.of(split)
        if self.settings.trained == "frozen":
            arrays = self._of_features(predictor, features, numbers)
        else:
            arrays = outputs_of(predictor, data, numbers, self.processes)
        pairs = zip(numbers, arrays, strict=True)
        return [HeldOut(data.examples[n], data.ids(n), array, data.wanted[n]) for n, array in pairs]

    @torch.no_grad()
    def _of_features(self, predictor: Predictor, features: np.ndarray, numbers: list[int]):
        bounds, head = self.data.rows_of(predictor.of_residues), predictor.head
        for number in numbers:
            rows = torch.from_numpy(features[bounds[number] : bounds[number + 1]]).to(head.weight.device)
            yield head(rows, torch.tensor([len(rows)], device=rows.device)).cpu().numpy()

    def _cross_validate(self, features: np.ndarray) -> list[HeldOut]:
        """Each protein as a head says it that was trained on others: one fold tests, the next chooses the penalty."""
        data, count, settings = self.data, self.settings.folds, self.settings
        stratify = settings.task == "classification" and settings.level == "sequence"
        how = {"seed": settings.seed, "stratify": stratify, "clusters": self.clusters}
        found = []
        for fold, (train, valid, test) in enumerate(turns(data.examples, count, **how)):
            solved = self._solve(features, train, valid)
            if settings.refit:
                solved = self._solve_again(features, train + valid, solved)
            bounds = data.rows
            for n in test:
                outputs = solved(features[bounds[n] : bounds[n + 1]])
                found.append(HeldOut(data.examples[n], data.ids(n), outputs, data.wanted[n], str(fold + 1)))
        return found

    def _scores(self, held_out: list[HeldOut]) -> dict:
        targets = self.data.targets
        outputs, wanted = (np.concatenate([getattr(one, name) for one in held_out]) for name in ("outputs", "wanted"))
        loss, count = targets.loss(torch.from_numpy(outputs), torch.from_numpy(wanted))
        groups = np.repeat(np.arange(len(held_out)), [len(one.outputs) for one in held_out])
        return {"loss": float(loss) / max(count, 1)} | metrics.full(
            targets, outputs, wanted, groups, self.settings.seed
        )
