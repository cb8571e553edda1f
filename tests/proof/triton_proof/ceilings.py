"""How many registers a thread of each kernel may take at ESM-1b's sizes, and how many warps must fit on one SM.

An SM has 65,536 registers and waits for memory less the more warps it holds. Kernels that only read and write rows live
on that: 16 warps at least, and most are held to 64 registers, which leave 32. Products keep 64 sums a thread of 8 warps
and hide their loads behind a pipeline of tiles: 8 warps, and what they stay below 255 is room before a spill. Attention
holds two blocks of 4 warps, in its forward pass three (168 registers) where HMMA takes operands from registers. Without
tensor cores (fp32) all operands lie in registers, and one block of 8 warps may have the SM to itself.
"""

from .audit import Facts

WIDE = (90, 100)  # wgmma and tcgen05 take larger tiles
# By kernel: in half precision, not there and there; in fp32, anywhere.
PRODUCTS = {
    "attention_forward": (168, 240, 144),
    "attention_backward": (184, 192, 216),
    "contact_lse": (48, 48, 48),
    "contact_sums": (112, 120, 176),
    "contact_tiles": (184, 224, 104),
    "contact_backward_q": (168, 255, 152),
    "contact_backward_k": (144, 248, 255),
    "linear": (224, 200, 168),
    "lm_dense": (216, 168, 168),
    "input_grad": (224, 128, 200),
    "qkv_projection": (176, 120, 168),
    "gelu_ffn_backward": (208, 160, 128),
    "lm_project": (128, 200, 80),
}
ROWS = {
    "attention_delta": 64,
    "contact_backward_sums": 128,  # a product in fp32, of all heads' sums at once
    "contact_shares": 40,
    "embed_rows": 48,
    "layer_norm_backward": 112,
    "layer_norm_forward": 40,
    "lm_hidden_backward": 104,
    "masked_softmax_backward": 64,
    "masked_softmax_forward": 64,
    "pool_backward": 40,
    "pool_rows": 40,
    "rotary": 72,
    "spread_rows": 40,
    "sum_rows": 48,
    "take_rows": 40,
    "token_factors": 40,
}
LONG_ROWS = {"masked_softmax_backward": 120}  # 16 elements a thread, for rows longer than a model has them
WARPS = {**dict.fromkeys(PRODUCTS, 8), **dict.fromkeys(ROWS, 16)}


def ceiling(facts: Facts) -> int:
    """The most registers that a compilation may take."""
    if facts.kernel in ROWS:
        return (LONG_ROWS if "BLOCK=4096" in facts.constexprs else ROWS).get(facts.kernel, ROWS[facts.kernel])
    old, wide, fp32 = PRODUCTS[facts.kernel]
    return fp32 if facts.dtype == "fp32" else wide if facts.arch in WIDE else old


def problems(facts: Facts) -> list[str]:
    found = []
    if facts.kernel not in WARPS:
        return [f"{facts} has no ceiling"]
    if facts.registers > ceiling(facts):
        found.append(f"{facts} takes {facts.registers} registers, more than {ceiling(facts)}")
    if facts.blocks * facts.warps < WARPS[facts.kernel]:
        found.append(f"{facts} has {facts.blocks * facts.warps} warps on an SM, fewer than {WARPS[facts.kernel]}")
    return found
