"""ESM-1b (Rives et al. 2021) and ESM-1v (Meier et al. 2021): pre-LN transformers with learned positions."""

import math
from argparse import Namespace
from dataclasses import dataclass

import torch
from torch import nn

from .. import ops
from ..alphabet import MASK, PAD, TOKENS
from ..sequences.batching import PackedBatch
from . import family
from .attached import is_plain, require_numbers
from .encoder import Encoder
from .family import LayoutError, Part
from .layers import LayerNorm


@dataclass(frozen=True)
class Config(family.Config):
    """Sizes of one model. max_positions counts tokens, <cls> and <eos> included."""

    max_positions: int = 1024
    token_dropout: bool = True
    emb_layer_norm_before: bool = True
    layer_norm_eps: float = 1e-5

    @property
    def max_residues(self) -> int:
        """The longest protein that the model takes: 1,022 for ESM-1b."""
        return self.max_positions - 2


_ESM1B = Config(33, 1280, 5120, 20)
_ESM1V = Config(33, 1280, 5120, 20, emb_layer_norm_before=False)
CONFIGS: dict[str, Config] = {
    "esm1b_t33_650M_UR50S": _ESM1B,
    **{f"esm1v_t33_650M_UR90S_{i}": _ESM1V for i in range(1, 6)},
    "esm1b_t6_demo": Config(6, 192, 768, 3),  # the embedded default: ESM-1b in small
}


class ESM1(Encoder):
    """ESM-1b or ESM-1v: a row of a table is added for each position."""

    def make_positions(self) -> None:
        config, width = self.config, self.config.embed_dim
        self.embed_positions = nn.Embedding(config.max_positions + PAD + 1, width, padding_idx=PAD)
        norm = LayerNorm(width, config.layer_norm_eps) if config.emb_layer_norm_before else None
        self.emb_layer_norm_before = norm

    @property
    def position_rows(self) -> int:
        return len(self.embed_positions.weight)

    def embedding_is_plain(self) -> bool:
        own, plain = self._modules, [super().embedding_is_plain()]
        require_numbers(own["embed_positions"], "embed_positions", padding_idx=PAD, max_norm=None)
        plain.append(is_plain(own["embed_positions"], nn.Embedding, "embed_positions"))
        if (norm := own.get("emb_layer_norm_before")) is not None:
            plain.append(is_plain(norm, LayerNorm, "emb_layer_norm_before"))
        return all(plain)

    def embed_by_modules(self, tokens: torch.Tensor, positions: torch.Tensor, factor) -> torch.Tensor:
        x = super().embed_by_modules(tokens, positions, factor)
        x = x + self.embed_positions(positions).to(x.dtype)
        return x if self.emb_layer_norm_before is None else self.emb_layer_norm_before(x)

    def embed(self, batch: PackedBatch, scale) -> torch.Tensor:
        norm = self.emb_layer_norm_before
        return ops.embedding(
            batch.tokens,
            batch.positions,
            batch.cu_seqlens,
            self.embed_tokens.weight,
            self.embed_positions.weight,
            ln_weight=None if norm is None else norm.weight,
            ln_bias=None if norm is None else norm.bias,
            token_dropout=self.config.token_dropout,
            scale=scale,
            eps=self.config.layer_norm_eps if norm is None else norm.eps,
            backend=self.backend,
        )


_HF_TOP = {
    "embeddings.word_embeddings.": "embed_tokens.",
    "embeddings.position_embeddings.": "embed_positions.",
    "embeddings.layer_norm.": "emb_layer_norm_before.",
    "encoder.emb_layer_norm_after.": "emb_layer_norm_after.",
    "contact_head.": "contact_head.",
    "lm_head.decoder.": "lm_head.",
    "lm_head.": "lm_head.",
}


def _from_fair_key(key: str) -> str:
    """'encoder.sentence_encoder.layers.0...' and 'encoder.lm_head...' -> fair-esm's canonical key."""
    return key.split("sentence_encoder.")[-1].removeprefix("encoder.")


def _without_mask_row(table: torch.Tensor) -> torch.Tensor:
    table = table.clone()
    if table.ndim:
        table[MASK : MASK + 1] = 0  # none in a table that is too short, which is found when it meets its size
    return table


def _positive(args: dict, name: str) -> int:
    value = args.get(name)
    if not isinstance(value, int) or value < 1:
        raise LayoutError(f"the argument {name!r} is {value!r}, expected a positive integer")
    return value


# Of a table of waves, each entry's size: Adam moves the rows of a table by its learning rate whatever their gradient,
# and most of theirs is noise: 0.05 within a few thousand steps of 1e-3. What is to survive begins well above that.
_WAVES_RMS = 0.1
_SHARPNESS = 1.5  # of queries and keys that find a neighbour: its weight is about half of all at first


def _look_at_neighbours(model: Encoder, generator: torch.Generator) -> None:
    """Two heads of layer l begin by looking at the residues l before and l behind. A short run does not find neighbours
    from random numbers, and then learns each protein's composition and nothing about order.

    Position i becomes (sin w i, cos w i) for random frequencies w, so that rows are alike only where they are equal
    (Rahimi and Recht 2007). A query holds some of these waves as they are, and the key of j those of j - offset. The
    table of positions is learned all the same.
    """
    rows, width = model.embed_positions.weight.shape
    frequency = torch.rand(width // 2, generator=generator) * math.pi
    angle = torch.arange(rows)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], 1) * (_WAVES_RMS * 2**0.5)
    model.embed_positions.weight[:, : waves.shape[1]] = waves
    for distance, layer in enumerate(model.layers, start=1):
        projections = layer.self_attn.q_proj, layer.self_attn.k_proj
        queries, keys = (p.weight.unflatten(0, (model.config.attention_heads, -1)) for p in projections)
        for head, offset in zip(range(len(queries)), (-distance, distance), strict=False):
            chosen = torch.randperm(len(frequency), generator=generator)[: queries.shape[1] // 2]
            queries[head], keys[head] = (_shifted(chosen, frequency, shift, queries.shape[1:]) for shift in (0, offset))


def _shifted(chosen: torch.Tensor, frequency: torch.Tensor, shift: int, shape: torch.Size) -> torch.Tensor:
    """(head_dim, width): takes the chosen waves of position i - shift from the row of position i."""
    matrix, count, sines = torch.zeros(shape), len(chosen), torch.arange(len(chosen))
    turn = frequency[chosen] * -shift
    matrix[sines, chosen], matrix[sines, chosen + len(frequency)] = turn.cos(), turn.sin()
    matrix[count + sines, chosen], matrix[count + sines, chosen + len(frequency)] = -turn.sin(), turn.cos()
    return matrix * _SHARPNESS


class _ESM1Family(family.Family):
    title = "ESM-1b and ESM-1v"
    config = Config
    model = ESM1
    published = CONFIGS
    aliases = {"facebook/esm-1b": "esm1b_t33_650M_UR50S", "esm1v_t33_650M_UR90S": "esm1v_t33_650M_UR90S_1"}
    attention = {"neighbours": _look_at_neighbours}
    fair_esm_class = "esm.model.esm1:ProteinBertModel"
    parts = {
        "transformers": (
            Part("embeddings.position_embeddings", "torch.nn:Embedding", "embed_positions"),
            Part("embeddings.layer_norm", "torch.nn:LayerNorm", "emb_layer_norm_before", optional=True),
        ),
        "fair-esm": (
            Part("embed_positions", "esm.modules:LearnedPositionalEmbedding", "embed_positions"),
            Part("emb_layer_norm_before", "esm.modules:ESM1bLayerNorm", "emb_layer_norm_before", optional=True),
        ),
    }

    def fair_esm_attributes(self, config: Config) -> dict:
        return {"args": Namespace(arch="roberta_large", **vars(config))}

    def has_regression(self, name: str) -> bool:
        return name.startswith("esm1b")  # ESM-1v was published without

    def from_fair_esm(self, content: dict):
        if getattr(content.get("args"), "arch", None) != "roberta_large":
            return None
        args = {name.removeprefix("encoder_"): value for name, value in vars(content["args"]).items()}
        tensors = family.renamed(content["model"], _from_fair_key)
        config = Config(
            **{name: _positive(args, name) for name in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")},
            max_positions=_positive(args, "max_positions"),
            token_dropout=bool(args.get("token_dropout", False)),
            emb_layer_norm_before=any(key.startswith("emb_layer_norm_before") for key in tensors),
        )
        # As fair-esm does: a <mask> has no embedding of its own. The table is tied, so its logit is the bias alone.
        for key in {"embed_tokens.weight", "lm_head.weight"} & set(tensors):
            tensors[key] = _without_mask_row(tensors[key])
        return config, tensors

    def reads_hf(self, hf: dict) -> bool:
        return hf.get("position_embedding_type", "absolute") == "absolute"

    def config_from_hf(self, hf: dict) -> Config:
        family.require_hf(hf, {}, self.title)
        if hf.get("token_dropout") and hf.get("mask_token_id") != MASK:
            raise LayoutError(f"mask_token_id is {hf.get('mask_token_id')!r}, in {self.title} it is {MASK}")
        return Config(
            layers=hf["num_hidden_layers"],
            embed_dim=hf["hidden_size"],
            ffn_embed_dim=hf["intermediate_size"],
            attention_heads=hf["num_attention_heads"],
            max_positions=hf["max_position_embeddings"] - PAD - 1,
            token_dropout=bool(hf.get("token_dropout")),
            emb_layer_norm_before=bool(hf.get("emb_layer_norm_before")),
            layer_norm_eps=hf.get("layer_norm_eps", 1e-12),  # transformers' own default; ESM-1b's files say 1e-5
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
            max_position_embeddings=config.max_positions + PAD + 1,
            layer_norm_eps=config.layer_norm_eps,
            position_embedding_type="absolute",
            emb_layer_norm_before=config.emb_layer_norm_before,
            token_dropout=config.token_dropout,
        )

    def from_hf_key(self, key: str) -> str | None:
        return family.translate_hf_key(key, _HF_TOP, ("embeddings.position_ids", *family.HF_UNUSED))

    def describe(self, sizes: dict, parts: dict[str, nn.Module]) -> Config:
        if "emb_layer_norm_before" in parts:
            sizes["layer_norm_eps"] = getattr(parts["emb_layer_norm_before"], "eps", sizes["layer_norm_eps"])
        return Config(
            **sizes,
            max_positions=parts["embed_positions"].num_embeddings - PAD - 1,
            emb_layer_norm_before="emb_layer_norm_before" in parts,
        )


FAMILY = _ESM1Family()
