"""ESM-2 (Lin et al. 2023): pre-LN transformers with rotary positions (Su et al. 2021), which limit no length."""

import operator
from argparse import Namespace
from dataclasses import dataclass

import torch
from torch import nn

from .. import ops
from ..alphabet import MASK, PAD, TOKENS
from ..sequences.batching import PackedBatch
from . import family
from .attached import NotPackable, require_own
from .encoder import Encoder, Parts
from .family import LayoutError, Part

_BASE = 10000.0
_ROTATION = "self_attn.rot_emb"  # fair-esm has one in each layer, all the same
_FREQUENCIES = f"{_ROTATION}.inv_freq"
_HF_ROTATION = "transformers.models.esm.modeling_esm:EsmRotaryEmbedding"


@dataclass(frozen=True)
class Config(family.Config):
    """Sizes of one model. The published ones were trained on proteins of up to 1,022 residues, and take longer ones."""

    token_dropout: bool = True
    layer_norm_eps: float = 1e-5
    family: str = "esm2"

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head dimension, this is {self.head_dim}")


def _sizes(layers: int, width: int, heads: int) -> Config:
    return Config(layers, width, 4 * width, heads)


CONFIGS: dict[str, Config] = {
    "esm2_t6_8M_UR50D": _sizes(6, 320, 20),
    "esm2_t12_35M_UR50D": _sizes(12, 480, 20),
    "esm2_t30_150M_UR50D": _sizes(30, 640, 20),
    "esm2_t33_650M_UR50D": _sizes(33, 1280, 20),
    "esm2_t36_3B_UR50D": _sizes(36, 2560, 40),
    "esm2_t48_15B_UR50D": _sizes(48, 5120, 40),
}

_DIFFERENT = f"the layers have different rotary frequencies ({_FREQUENCIES})"


class RotaryEmbedding(nn.Module):
    """The frequencies of the rotation, which checkpoints hold: the published ones were rounded to fp16, and with those
    computed anew results are off by 4 % at 1,024 tokens. They stay fp32 whatever the model is converted to.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(head_dim // 2))
        self.reset()

    def reset(self) -> None:
        """As the original code begins (Su et al. 2021); for models that are not loaded."""
        half = len(self.inv_freq)
        exponents = torch.arange(half, dtype=torch.float64, device=self.inv_freq.device) / half
        self.inv_freq = (_BASE**-exponents).float()

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """(2, n, head_dim): cosines and sines of (n,) positions, fp32.

        Angles are computed in fp64: in fp32 that of position 35,000 would be off by a thousandth.
        """
        angles = torch.outer(positions.double(), self.inv_freq.double()).repeat(1, 2)
        return torch.stack([angles.cos(), angles.sin()]).float()

    def _apply(self, fn, recurse=True):
        """What model.to(dtype) and .half() do: the device changes, the type does not."""
        before = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != before.dtype and not before.is_meta:
            self.inv_freq = before.to(self.inv_freq.device)
        return self


class ESM2(Encoder):
    """ESM-2: queries and keys are rotated by their position's angles, the same in every layer.

    Each layer has its frequencies, as in fair-esm, so that whoever edits one layer's or loops over all gets what is
    meant; layers that turn differently run by their modules.
    """

    # The frequencies that were found to be one, and how often each had been written. What is written through `.data`
    # counts nowhere: on a GPU it is not noticed.
    _compared: tuple[list, list | None] = ([], None)

    def __init__(self, config: Config, *, backend: str | None = None):
        super().__init__(config, backend=backend)
        for layer in self.layers:
            layer.self_attn.rot_emb = RotaryEmbedding(config.head_dim)
        self.register_load_state_dict_pre_hook(_require_one_rotation_in)

    def reset_buffers(self) -> None:
        for layer in self.layers:
            layer.self_attn.rot_emb.reset()

    def examine(self, *, contacts: bool) -> Parts:
        parts = super().examine(contacts=contacts)
        if self.pads_by_itself:  # of another package's model its own layout tells
            self._require_one_rotation()
        return parts

    def _require_one_rotation(self) -> None:
        found = []
        for number, layer in enumerate(self.layers):
            rotation = layer._modules["self_attn"]._modules.get("rot_emb")
            require_own(rotation, RotaryEmbedding, f"layers.{number}.{_ROTATION}")
            found.append(rotation._buffers["inv_freq"])
        if torch.compiler.is_compiling():
            for other in found[1:]:  # a graph cannot branch on a value; this raises when it runs
                torch._assert_async((other == found[0]).all(), _DIFFERENT)
            return
        versions = None if any(each.is_inference() for each in found) else [each._version for each in found]
        known, then = self._compared
        same = versions is not None and versions == then and all(map(operator.is_, known, found))
        if self.device.type != "cpu" and same:  # there each comparison would wait for the device
            return
        if any(not torch.equal(other, found[0]) for other in found[1:]):
            raise NotPackable(_DIFFERENT)
        self._compared = found, versions

    def embed(self, batch: PackedBatch, scale) -> torch.Tensor:
        return ops.embedding(
            batch.tokens,
            batch.positions,
            batch.cu_seqlens,
            self.embed_tokens.weight,
            token_dropout=self.config.token_dropout,
            scale=scale,
            backend=self.backend,
        )

    def rotary(self, batch: PackedBatch) -> torch.Tensor:
        return self.layers[0].self_attn.rot_emb(batch.positions - (PAD + 1))  # the first token has 0

    def positions(self, counted: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return columns + (PAD + 1)  # fair-esm and transformers count padding too

    def tied(self) -> dict[str, str]:
        keys = [f"layers.{number}.{_FREQUENCIES}" for number in range(self.config.layers)]
        return super().tied() | dict.fromkeys(keys[1:], keys[0])


def _require_one_rotation_in(model: ESM2, state: dict, prefix: str, *_) -> None:
    """Layers with other frequencies than the first one's would be computed with those of the first."""
    found = [tensor for key, tensor in state.items() if key.startswith(prefix) and key.endswith(_FREQUENCIES)]
    if any(not torch.equal(tensor, found[0]) for tensor in found[1:] if not tensor.is_meta):
        raise ValueError(f"{_DIFFERENT}, which no file of esm_fast holds")


class _ESM2Family(family.Family):
    title = "ESM-2"
    config = Config
    model = ESM2
    published = CONFIGS
    fair_esm_class = "esm.model.esm2:ESM2"
    parts = {
        "transformers": (Part("rotary_embeddings", _HF_ROTATION, f"layers.0.{_ROTATION}"),),
    }
    layer_parts = {
        "fair-esm": (Part(_ROTATION, "esm.rotary_embedding:RotaryEmbedding", _ROTATION),),
    }

    def fair_esm_attributes(self, config: Config) -> dict:
        names = ("embed_dim", "attention_heads", "token_dropout")
        return {name: getattr(config, name) for name in names}

    def from_fair_esm(self, content: dict):
        cfg = content.get("cfg")
        sizes = cfg.get("model") if isinstance(cfg, dict) else getattr(cfg, "model", None)
        sizes = vars(sizes) if isinstance(sizes, Namespace) else sizes
        if not isinstance(sizes, dict) or not isinstance(content.get("model"), dict):
            return None
        tensors = {_from_fair_key(key): tensor for key, tensor in content["model"].items()}
        if not any(key.endswith(_FREQUENCIES) for key in tensors):
            raise LayoutError(f"it holds no rotary frequencies (layers.0.{_FREQUENCIES}); esm_fast never makes them up")
        width = _positive(sizes, "encoder_embed_dim")
        config = Config(
            layers=_positive(sizes, "encoder_layers"),
            embed_dim=width,
            ffn_embed_dim=4 * width,
            attention_heads=_positive(sizes, "encoder_attention_heads"),
            token_dropout=bool(sizes.get("token_dropout", False)),
        )
        return config, tensors

    def describe(self, sizes: dict, parts: dict[str, nn.Module]) -> Config:
        rotations = [module for key, module in parts.items() if key.endswith("rot_emb")]
        if any(getattr(module, "attention_scaling", 1.0) != 1.0 for module in rotations):
            raise LayoutError(f"its rotary positions are scaled; those of {self.title} are not")
        if any(not torch.equal(module.inv_freq, rotations[0].inv_freq) for module in rotations[1:]):
            raise LayoutError("its layers have different rotary frequencies")
        return Config(**sizes)

    def reads_hf(self, hf: dict) -> bool:
        return hf.get("position_embedding_type") == "rotary"

    def config_from_hf(self, hf: dict) -> Config:
        family.require_hf(hf, {"emb_layer_norm_before": False}, self.title)
        if hf.get("token_dropout") and hf.get("mask_token_id") != MASK:
            raise LayoutError(f"mask_token_id is {hf.get('mask_token_id')!r}, in {self.title} it is {MASK}")
        head_dim = hf["hidden_size"] // hf["num_attention_heads"]
        if (hf.get("head_dim") or head_dim) != head_dim:
            raise LayoutError(f"head_dim is {hf['head_dim']!r}; in {self.title} it is {head_dim}")
        if scaling := hf.get("rope_scaling"):
            raise LayoutError(f"rope_scaling is {scaling!r}; {self.title} has none")
        return Config(
            layers=hf["num_hidden_layers"],
            embed_dim=hf["hidden_size"],
            ffn_embed_dim=hf["intermediate_size"],
            attention_heads=hf["num_attention_heads"],
            token_dropout=bool(hf.get("token_dropout")),
            layer_norm_eps=hf.get("layer_norm_eps", 1e-12),
        )

    def hf_config(self, config: Config) -> dict:
        return dict(
            vocab_size=len(TOKENS),
            mask_token_id=MASK,
            pad_token_id=PAD,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.attention_heads,
            intermediate_size=config.ffn_embed_dim,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=1026,  # as in the published files, where it means nothing
            layer_norm_eps=config.layer_norm_eps,
            position_embedding_type="rotary",
            emb_layer_norm_before=False,
            token_dropout=config.token_dropout,
        )

    def from_hf_key(self, key: str) -> str | None:
        """Frequencies stand in each layer, once beside the layers, or under a key with a literal star."""
        bare = key.removeprefix("esm.")
        if bare == "rotary_embeddings.inv_freq" or bare == _HF_STAR:
            return f"layers.0.{_FREQUENCIES}"
        if bare.startswith("encoder.layer.") and bare.endswith(".attention.self.rotary_embeddings.inv_freq"):
            return f"layers.{bare.split('.')[2]}.{_FREQUENCIES}"
        return family.translate_hf_key(key, _HF_TOP, _HF_UNUSED)


_HF_STAR = "encoder.layer.*.attention.self.rotary_embeddings.inv_freq"  # transformers 5 writes it so
_HF_UNUSED = ("embeddings.position_ids", "embeddings.position_embeddings.", *family.HF_UNUSED)
_HF_TOP = {
    "embeddings.word_embeddings.": "embed_tokens.",
    "encoder.emb_layer_norm_after.": "emb_layer_norm_after.",
    "contact_head.": "contact_head.",
    "lm_head.decoder.": "lm_head.",
    "lm_head.": "lm_head.",
}


def _from_fair_key(key: str) -> str:
    return key.split("sentence_encoder.")[-1].removeprefix("encoder.")


def _positive(sizes: dict, name: str) -> int:
    value = sizes.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LayoutError(f"cfg['model'] has {name!r} {value!r}, expected a positive integer")
    return value


FAMILY = _ESM2Family()
