"""What a model family is: everything of its own, in one file of this folder, found by its name.

A file with a `Family` named FAMILY is all that a new one takes. Names, sizes, addresses, the keys and
configurations of other packages' files, positions, limits and first weights stand there and nowhere else.
"""

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..alphabet import PAD, TOKENS

if TYPE_CHECKING:
    from .encoder import Encoder

FAIR_ESM_URL = "https://dl.fbaipublicfiles.com/fair-esm"
REGRESSION = "-contact-regression.pt"  # what fair-esm's regressions are called, after the name of their model
LARGEST = 1 << 24  # of any size of a model, which is checked before anything is made of it
LONGEST = 2**31 - 3  # residues that 32-bit offsets count, beside <cls> and <eos>
TRAINED_RESIDUES = 1022  # of the longest crops that the published models were trained on


class LayoutError(ValueError):
    """A file of another package that is this family's, and that cannot be read; the message says what is wrong."""


@dataclass(frozen=True)
class Config:
    """Sizes of one model; each family adds its own. `family` tells which it is, where it is not the first one's."""

    layers: int
    embed_dim: int
    ffn_embed_dim: int
    attention_heads: int

    def __post_init__(self):
        for field in fields(self):
            if problem := _problem(getattr(self, field.name), field.type):
                raise ValueError(f"{field.name} is {getattr(self, field.name)!r}, expected {problem}")
        if self.embed_dim % self.attention_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of {self.attention_heads} attention heads")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.attention_heads

    @property
    def max_residues(self) -> int | None:
        """The longest protein that the model takes; None where nothing limits it."""
        return None

    def limit(self, overlength: str) -> int:
        """The residues a protein may have under one of `Policy`'s overlength: more is an error, cut off, or cut up."""
        return self.max_residues or (LONGEST if overlength == "error" else TRAINED_RESIDUES)

    @property
    def window_residues(self) -> int:
        """What a protein is cut to on request, to one piece or to windows."""
        return self.max_residues or TRAINED_RESIDUES


def _problem(value: object, kind: type) -> str | None:
    """What a size should be and is not. No size is near the largest, whose products still fit 64 bits."""
    if kind is int:
        return None if type(value) is int and 0 < value <= LARGEST else f"a positive integer up to {LARGEST:,}"
    if kind is float:
        positive = type(value) in (int, float) and 0 < value < math.inf
        return None if positive else "a positive number"
    return None if type(value) is kind else {bool: "true or false"}.get(kind, f"a {kind.__name__}")


class Part(NamedTuple):
    """A module of another package's model: its path, its class as 'module:name', and the module of ours, if there is
    one, that takes its parameters."""

    path: str
    kind: str
    ours: str | None = None
    optional: bool = False


class Family:
    """One family. The methods about other packages' files get what was read there and know nothing of files."""

    title: str  # as people call it
    config: type[Config]
    model: "type[Encoder]"
    published: dict[str, Config]  # by fair-esm's names
    aliases: dict[str, str] = {}  # other names, those of Hugging Face's repositories among them
    fair_esm_class: str  # fair-esm's class, as 'module:name'
    parts: dict[str, tuple[Part, ...]]  # package -> its modules that not every family has
    layer_parts: dict[str, tuple[Part, ...]] = {}  # the same within a layer
    attention: dict[str, Callable[["Encoder", torch.Generator], None]] = {}  # what heads may begin as in training

    def fair_esm_attributes(self, config: Config) -> dict[str, Any]:
        """What fair-esm's models have as attributes beside those of all families."""
        return {}

    def has_regression(self, name: str) -> bool:
        """Whether fair-esm published a contact regression for a model."""
        return True

    def downloads(self, name: str) -> list[tuple[str, str]]:
        """(address, name of the file) of what fair-esm published as this model, the model itself last."""
        side = [(f"{FAIR_ESM_URL}/regression/{name}{REGRESSION}", name + REGRESSION)]
        return side * self.has_regression(name) + [(f"{FAIR_ESM_URL}/models/{name}.pt", f"{name}.pt")]

    def from_fair_esm(self, content: dict) -> tuple[Config, dict[str, torch.Tensor]] | None:
        """Sizes and tensors of a .pt file; None for a file of another family. Raises LayoutError."""
        raise NotImplementedError

    def reads_hf(self, hf: dict) -> bool:
        """Whether a configuration of transformers' ESM is this family's."""
        raise NotImplementedError

    def config_from_hf(self, hf: dict) -> Config:
        """transformers' EsmConfig, as a dictionary, -> ours. Raises LayoutError."""
        raise NotImplementedError

    def hf_config(self, config: Config) -> dict:
        """Our sizes as the fields of an EsmConfig."""
        raise NotImplementedError

    def from_hf_key(self, key: str) -> str | None:
        """transformers' name of a tensor (with or without 'esm.') -> ours; None for one that is not used.

        An unknown name is returned as it is, so that the check of the tensors names it.
        """
        raise NotImplementedError

    def describe(self, sizes: dict[str, Any], parts: dict[str, torch.nn.Module]) -> Config:
        """The Config of another package's model.

        Args:
            sizes: layers, embed_dim, ffn_embed_dim, attention_heads, token_dropout, layer_norm_eps.
            parts: its modules by the names of ours that take their parameters, a layer's as "layers.0..."

        Raises LayoutError.
        """
        return self.config(**sizes)


@functools.cache
def families() -> dict[str, Family]:
    """Every family by the name of its file, which calls it FAMILY."""
    package = importlib.import_module(__name__.rpartition(".")[0])
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
    return {name: module.FAMILY for name, module in modules.items() if hasattr(module, "FAMILY")}


def titles() -> str:
    """For messages: all that can be read."""
    return " and ".join(family.title for family in families().values())


def published() -> dict[str, Config]:
    """The sizes of all published models, by fair-esm's names, and of the small one in this package."""
    return {name: config for family in families().values() for name, config in family.published.items()}


def aliases() -> dict[str, str]:
    return {alias: name for family in families().values() for alias, name in family.aliases.items()}


def canonical_name(name: str) -> str:
    """'facebook/esm-1b', 'facebook/esm1b_t33_650M_UR50S' ... -> fair-esm's name; anything else is returned as it is."""
    bare = name.removeprefix("facebook/")
    return aliases().get(name, bare if bare in published() else name)


def of_name(name: str) -> Family:
    """The family of a published model, by fair-esm's name."""
    return next(family for family in families().values() if name in family.published)


def of_config(config: Config) -> Family:
    return next(family for family in families().values() if type(config) is family.config)


def config_class(values: dict) -> type[Config]:
    """The class of a configuration that was stored as a dictionary. Raises ValueError for a family we do not have.

    One without a family is of the family whose sizes do not name it: there was one when it was written.
    """
    name = values.get("family")
    if name is not None and name not in families():
        raise ValueError(f"its family is {name!r}; this version of esm_fast has {', '.join(families())}")
    if name is not None:
        return families()[name].config
    return next(f.config for f in families().values() if "family" not in {field.name for field in fields(f.config)})


HF_UNUSED = ("pooler.", "classifier.")  # of transformers' names: the heads of classifiers are not the encoder's

# transformers' names within a layer, the same in all families. Those of layer norms may have TensorFlow's form.
_HF_LAYER = {
    "attention.self.query.": "self_attn.q_proj.",
    "attention.self.key.": "self_attn.k_proj.",
    "attention.self.value.": "self_attn.v_proj.",
    "attention.output.dense.": "self_attn.out_proj.",
    "attention.LayerNorm.": "self_attn_layer_norm.",
    "intermediate.dense.": "fc1.",
    "output.dense.": "fc2.",
    "LayerNorm.": "final_layer_norm.",
}
_HF_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def translate_hf_key(key: str, top: dict[str, str], ignored: tuple[str, ...]) -> str | None:
    """`Family.from_hf_key` for names that begin as `top` says outside the layers; `ignored` are not used."""
    bare = key.removeprefix("esm.")
    for old, new in _HF_RENAMED.items():
        bare = bare.replace(old, new)
    if bare.startswith(ignored):
        return None
    prefix, names = "", top
    if bare.startswith("encoder.layer."):
        number, _, bare = bare.removeprefix("encoder.layer.").partition(".")
        prefix, names = f"layers.{number}.", _HF_LAYER
    for theirs, ours in names.items():
        if bare.startswith(theirs):
            return prefix + ours + bare.removeprefix(theirs)
    return key


def renamed(tensors: dict[str, torch.Tensor], rename: Callable[[str], str | None]) -> dict[str, torch.Tensor]:
    """Tensors under other names; those renamed to None are left out. LayoutError for two of one name that differ."""
    result: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = rename(key)
        if name in result and not torch.equal(result[name], tensor):
            raise LayoutError(f"{name} is there twice, with different numbers")
        if name is not None:
            result[name] = tensor
    return result


def require_hf(hf: dict, wanted: dict[str, Any], title: str) -> None:
    """Raises LayoutError where transformers' configuration is not that of an encoder with our tokens."""
    wanted = {
        "vocab_size": len(TOKENS),
        "pad_token_id": PAD,
        "is_folding_model": False,
        "is_decoder": False,
        "add_cross_attention": False,
    } | wanted
    defaults = {"pad_token_id": PAD, "is_folding_model": False, "is_decoder": False, "add_cross_attention": False}
    for name, value in wanted.items():
        got = hf.get(name, defaults.get(name))
        if (got or False) != (value or False):
            raise LayoutError(f"{name} is {got!r}; esm_fast reads {title}, where it is {value!r}")
