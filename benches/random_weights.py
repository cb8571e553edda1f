"""Random weights of a family's shape, under fair-esm's names: speed does not depend on their values, rounding does."""

import torch
from common import Size

from esm_fast.alphabet import TOKENS

OUTLIER_CHANNELS = 0.01  # share of a layer norm's channels whose gain stands out
OUTLIER_GAINS = (10.0, 30.0)
MASSIVE_CHANNELS = 3  # of the residual stream, the same ones in every layer
MASSIVE = 100.0  # times the size of an ordinary channel
MASSIVE_AFTER = 2  # the layer whose feed-forward block writes them


def random_state(size: Size, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights scaled to keep activations of order 1 and attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def normal(name, *shape, std=1.0, mean=0.0):
        state[name] = torch.empty(shape).normal_(mean, std, generator=generator)

    def linear(name, rows, columns, gain=1.0):
        normal(f"{name}.weight", rows, columns, std=gain * columns**-0.5)
        normal(f"{name}.bias", rows, std=0.1)

    def norm(name):
        normal(f"{name}.weight", width, std=0.1, mean=1.0)
        normal(f"{name}.bias", width, std=0.1)

    width, hidden = size.embed_dim, size.ffn_embed_dim
    normal("embed_tokens.weight", len(TOKENS), width)
    state["embed_tokens.weight"][TOKENS.index("<pad>")] = 0
    learned = size.family == "esm1"
    if learned:
        normal("embed_positions.weight", size.max_positions + 2, width)
        state["embed_positions.weight"][TOKENS.index("<pad>")] = 0
        state["embed_tokens.weight"][TOKENS.index("<mask>")] = 0
        norm("emb_layer_norm_before")
    for i in range(size.layers):
        for part in "qkv":  # the gain gives attention scores a standard deviation of 2
            linear(f"layers.{i}.self_attn.{part}_proj", width, width, gain=1.0 if part == "v" else 2**0.5)
        linear(f"layers.{i}.self_attn.out_proj", width, width)
        norm(f"layers.{i}.self_attn_layer_norm")
        linear(f"layers.{i}.fc1", hidden, width)
        linear(f"layers.{i}.fc2", width, hidden)
        norm(f"layers.{i}.final_layer_norm")
        if not learned:
            state[f"layers.{i}.self_attn.rot_emb.inv_freq"] = rotary_frequencies(width // size.attention_heads)
    norm("emb_layer_norm_after")
    linear("lm_head.dense", width, width)
    norm("lm_head.layer_norm")
    state["lm_head.weight"] = state["embed_tokens.weight"]
    normal("lm_head.bias", len(TOKENS), std=0.1)
    linear("contact_head.regression", 1, size.layers * size.attention_heads)
    return state


def rotary_frequencies(head_dim: int) -> torch.Tensor:
    """Rounded to fp16, as those of the published ESM-2 are."""
    return (10000.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim)).half().float()


def trained_like_state(size: Size, seed: int = 0) -> dict[str, torch.Tensor]:
    """`random_state` with what makes trained transformers hard to round.

    Layer-norm gains are lognormal (sigma 0.5), 1 % of them 10 to 30 times larger on top; the matrices behind a layer
    norm are divided by the root mean square of its gains, as training would have them, so that activations stay of
    order 1 and attention is no sharper. Three channels of the residual stream are massive, 100 times the others, from
    the third layer on: a bias of fc2 writes them, as is seen in trained models.
    """
    state = random_state(size, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    width = size.embed_dim
    massive = torch.randperm(width, generator=generator)[:MASSIVE_CHANNELS]
    for i in range(size.layers):
        readers = {
            "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "final_layer_norm": ("fc1",),
        }
        for norm, matrices in readers.items():
            gains = _gains(width, generator)
            gains[massive] *= 1 / MASSIVE  # what trained gains do with such channels
            state[f"layers.{i}.{norm}.weight"] = gains
            for matrix in matrices:
                state[f"layers.{i}.{matrix}.weight"] /= gains.square().mean().sqrt()
    state["emb_layer_norm_after.weight"] = _gains(width, generator)
    state["emb_layer_norm_after.weight"][massive] *= 1 / MASSIVE
    writer = min(MASSIVE_AFTER, size.layers - 1)
    signs = torch.randint(0, 2, (MASSIVE_CHANNELS,), generator=generator) * 2.0 - 1
    state[f"layers.{writer}.fc2.bias"][massive] = MASSIVE * signs
    return state


def _gains(width: int, generator: torch.Generator) -> torch.Tensor:
    gains = torch.empty(width).normal_(0, 0.5, generator=generator).exp_()
    outliers = torch.randperm(width, generator=generator)[: max(1, round(OUTLIER_CHANNELS * width))]
    low, high = OUTLIER_GAINS
    gains[outliers] *= torch.empty(len(outliers)).uniform_(low, high, generator=generator)
    return gains
