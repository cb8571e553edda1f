"""A recipe: everything that defines a pretraining run, read from YAML (or JSON, which is YAML too)."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import hub, weights
from ..models.family import Config, canonical_name, config_class, of_config, published
from .masking import Masking

PRECISIONS = ("float32", "bfloat16", "float16")
SHARDING = ("none", "zero1")
DECAYS = ("matrices", "all")
NON_FINITE = ("stop", "skip", "roll_back")
SAMPLING = ("records", "clusters")
SCHEDULES = ("inverse_sqrt", "linear")
# What may differ between a run and its continuation; anything else would make it another run.
MAY_CHANGE = {"steps", "cooldown", "batch_tokens", "sharding", "log_every", "valid_every", "save_every", "keep"}
MAY_CHANGE |= {"recompute", "deterministic", "non_finite", "async_checkpoints"}
MAY_CHANGE |= {"output", "store", "peak_tflops", "tensorboard", "plot"}


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file and the entry."""


def _positive(value: float) -> bool:
    return 0 < value < math.inf


# Entry -> (whether a value fits, what to give): a value outside would train uphill, or not at all.
_RANGES = {
    **dict.fromkeys(
        ("steps", "step_tokens", "batch_tokens", "log_every", "valid_every", "save_every", "keep"),
        (lambda value: 1 <= value < 2**62, "a whole number from 1"),
    ),
    **dict.fromkeys(
        ("warmup", "cooldown", "valid_tokens"), (lambda value: 0 <= value < 2**62, "a whole number from 0")
    ),
    **dict.fromkeys(("init_std", "learning_rate", "eps"), (_positive, "a number above 0")),
    **dict.fromkeys(
        ("clip", "peak_tflops"), (lambda value: value is None or _positive(value), "a number above 0, or null")
    ),
    "seed": (lambda value: 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1"),
    "weight_decay": (lambda value: 0 <= value < math.inf, "a number from 0"),
    "betas": (lambda value: 0 <= value < 1, "two numbers from 0 to below 1"),
}


@dataclass(frozen=True)
class Recipe:
    """The defaults are those of ESM-1b's model card; sizes of the run and paths have none.

    store: a path, or several with weights, their shares of each step's tokens. sampling: an epoch has every "records",
    or one of each of the store's "clusters", another each time (as ESM-1v and ESM-2 were trained). model: sizes, which
    may name their family; or a published model's name. init: weights to begin with, whatever `load` reads, whose sizes
    the model then has; None for random ones. step_tokens: in one update, over all processes, to within a sequence;
    batch_tokens: in one packed batch at most, as memory allows. weight_decay: decoupled from the gradient; decay: what
    it is of, "matrices" leaves biases and gains alone. schedule: of the rate after the warm-up. clip: the largest norm
    of the gradient, or None. attention: what the heads begin as (`model.new_model`). cooldown: the last steps, over
    which the learning rate goes to zero. recompute: each layer again in the backward pass, a third more work, instead
    of keeping what is inside it. deterministic: torch's algorithms whose results never differ, or an error. non_finite:
    what a gradient in bf16 or fp32 that is not finite does: "stop" the run, "skip" the step, ten in a row at most, or
    "roll_back" to the last checkpoint and pass over the batches since. async_checkpoints: written beside the steps.
    valid_tokens: how much of the held-out records is used each time, 0 for all. peak_tflops: of one device, for the
    MFU. keep: how many checkpoints stay.
    """

    model: Config
    store: str | dict
    output: str
    steps: int
    seed: int = 0
    sampling: str = "records"
    masking: Masking = field(default_factory=Masking)
    init: str | None = None
    init_std: float = 0.02
    attention: str = "normal"
    step_tokens: int = 131_072
    batch_tokens: int = 16_384
    learning_rate: float = 1e-4
    warmup: int = 16_000
    schedule: str = "inverse_sqrt"
    cooldown: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: str = "matrices"
    clip: float | None = None
    precision: str = "float32"
    recompute: bool = False
    sharding: str = "none"
    deterministic: bool = False
    non_finite: str = "stop"
    async_checkpoints: bool = True
    log_every: int = 10
    valid_every: int = 500
    valid_tokens: int = 1_000_000
    save_every: int = 500
    keep: int = 2
    peak_tflops: float | None = None
    tensorboard: bool = False
    plot: bool = True

    def __post_init__(self):
        attention = ("normal", *of_config(self.model).attention)
        choices = {"precision": PRECISIONS, "sharding": SHARDING, "attention": attention}
        choices |= {"decay": DECAYS, "schedule": SCHEDULES, "non_finite": NON_FINITE, "sampling": SAMPLING}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise RecipeError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(allowed)}")
        for name, (fits, expected) in _RANGES.items():
            value = getattr(self, name)
            if not all(fits(part) for part in (value if isinstance(value, tuple) else (value,))):
                raise RecipeError(f"{name} is {value}; give {expected}")
        if self.cooldown > self.steps:
            raise RecipeError(f"cooldown is {self.cooldown}, more than the {self.steps} steps of the run")
        if self.init is not None and self.attention != "normal":
            raise RecipeError(
                f"attention is {self.attention!r}, which is for random weights, and init is {self.init!r}"
            )

    def differences(self, other: dict) -> list[str]:
        """Entries in which another recipe, as a dictionary, is a different run."""
        own = as_dict(self)
        # Before there were these entries, a decay was added to the gradients of all parameters.
        before = {
            "init": None,
            "sampling": "records",
            "schedule": "inverse_sqrt",
            "decay": "gradients" if self.weight_decay else self.decay,
        }
        other = before | other
        return [
            f"{name} was {other.get(name)}, is {value}"
            for name, value in own.items()
            if name not in MAY_CHANGE and other.get(name) != value
        ]


def as_dict(recipe: Recipe) -> dict:
    """Plain values, as JSON keeps them."""
    values = asdict(recipe)
    return values | {"betas": list(values["betas"])}


def read_recipe(path: str | Path) -> Recipe:
    """Raises OSError, RecipeError; ImportError with advice where PyYAML is missing."""
    try:
        import yaml
    except ImportError:
        raise ImportError("recipes are YAML files, for which PyYAML is needed: pip install 'esm_fast[train]'") from None
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RecipeError(f"{path} is not YAML: {reason}") from None
    try:
        return recipe_from(values)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{path}: {error}") from None


def recipe_from(values: dict) -> Recipe:
    if isinstance(values, dict) and isinstance(values.get("init"), str):
        values = {"model": None} | values
    values = _fields(Recipe, values, "the recipe")
    model = values.get("model")
    if model is None and values.get("init") is not None:
        values["model"] = initial(values["init"]).config
    elif isinstance(model, str):
        if canonical_name(model) not in published():
            raise RecipeError(f"model is {model!r}; choose from {', '.join(published())}, or give its sizes")
        values["model"] = published()[canonical_name(model)]
    else:
        values["model"] = _group("model", _config, model)
    if "masking" in values:
        values["masking"] = _group(
            "masking", lambda own: Masking(**_fields(Masking, own, "masking")), values["masking"]
        )
    return Recipe(**values)


def _config(sizes) -> Config:
    if isinstance(sizes, dict) and not isinstance(sizes.get("family", ""), str):
        raise RecipeError(f"model: family is {sizes['family']!r}; expected a name, such as esm2")
    kind = config_class(sizes) if isinstance(sizes, dict) else Config
    return kind(**_fields(kind, sizes, "model"))


def _group(name: str, make: Callable, values):
    try:
        return make(values)
    except ValueError as error:
        is_named = str(error).startswith((f"{name} ", f"{name}:"))  # as what _fields says of the group
        raise RecipeError(str(error) if is_named else f"{name}: {error}") from None


def initial(name: str) -> weights.Checkpoint:
    """The weights of an entry init. Raises RecipeError."""
    try:
        return weights.read(hub.resolve(name)).unpacked()
    except (OSError, ValueError) as error:
        raise RecipeError(f"init is {name!r}, which cannot be read: {error}") from None


def _fields(kind: type, values, where: str) -> dict:
    """The values in the fields' types; YAML 1.1 reads 1e-4 as a text."""
    if not isinstance(values, dict):
        raise RecipeError(f"{where} is {values!r}; expected names and values")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        raise RecipeError(f"{where} has unknown entries: {', '.join(unknown)}; known are {', '.join(fields)}")
    empty = dataclasses.MISSING
    missing = [n for n, f in fields.items() if n not in values and f.default is empty and f.default_factory is empty]
    if missing:
        raise RecipeError(f"{where} lacks {', '.join(missing)}")
    return {name: _typed(name, value, fields[name].type) for name, value in values.items()}


def _store(value) -> str | dict[str, float]:
    """A path, or paths with weights."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not value or not all(isinstance(path, str) for path in value):
        raise RecipeError(
            f"store is {value!r}; expected a path, or paths with weights such as {{a.store: 3, b.store: 1}}"
        )
    weights_of = {path: _typed(f"store: weight of {path}", weight, float) for path, weight in value.items()}
    for path, weight in weights_of.items():
        if not _positive(weight):
            raise RecipeError(f"store: weight of {path} is {weight}; give a number above 0")
    return weights_of


def _pair(name: str, value) -> tuple[float, float]:
    try:
        first, second = (float(part) for part in value)
    except (TypeError, ValueError):
        raise RecipeError(f"{name} is {value!r}; expected two numbers, such as [0.9, 0.98]") from None
    return first, second


_NULL = type(None)
# Type of an entry -> (what YAML may give, what to say).
_KINDS = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    bool: ((bool,), "true or false"),
    float | None: ((int, float, _NULL), "a number, or null"),
    str | None: ((str, _NULL), "a text, or null"),
}


def _typed(name: str, value, kind):
    if kind == tuple[float, float]:
        return _pair(name, value)
    if kind == str | dict:
        return _store(value)
    if kind not in _KINDS:
        return value  # a group, read by the caller
    if isinstance(value, str) and float in (kind, *getattr(kind, "__args__", ())):
        with suppress(ValueError):
            value = float(value)
    wanted, expected = _KINDS[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"{name} is {value!r}; expected {expected}")
    try:
        return float(value) if kind is float else value
    except OverflowError:
        raise RecipeError(f"{name} is {value!r}, too large a number") from None
