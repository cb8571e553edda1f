"""pre_ln_attention: x + out(attention(q, k, v of LN(x))), the first half of a transformer layer, packed."""

from functools import partial

import torch

from .attention_varlen import attention_varlen
from .attention_varlen import shapes as attention_shapes
from .common import AWKWARD_LENGTHS, Maker, layer_norm, linear, spans
from .contract import Contract, flag, floats, heads_of, longest, offsets, real, turns, weights
from .registry import Case, Cost, op

CONTRACT = Contract(
    x=floats("n", "width"),
    cu_seqlens=offsets("n"),
    max_seqlen=longest(),
    ln_weight=floats("width"),
    ln_bias=floats("width"),
    q_weight=weights("width", "width"),
    q_bias=floats("width"),
    k_weight=weights("width", "width"),
    k_bias=floats("width"),
    v_weight=weights("width", "width"),
    v_bias=floats("width"),
    out_weight=weights("width", "width"),
    out_bias=floats("width"),
    heads=heads_of("width"),
    eps=real(),
    rotary=turns("n"),
    return_qk=flag(),
)


def _case(name, lengths, heads, head_dim, rotary=False) -> Case:
    def build(dtype, device, seed):
        make = Maker(dtype, device, seed)
        n, width = sum(lengths), heads * head_dim
        arguments = dict(
            x=make.residual(n, width),
            cu_seqlens=make.cu_seqlens(lengths),
            max_seqlen=max(lengths),
            ln_weight=make.gain(width),
            ln_bias=make.normal(width, scale=0.1),
            heads=heads,
            rotary=_rotary_tables(make, lengths, head_dim) if rotary else None,
        )
        for projection in ("q", "k", "v", "out"):
            arguments[f"{projection}_weight"] = make.weight(width, width)
            arguments[f"{projection}_bias"] = make.normal(width, scale=0.1)
        return arguments

    return Case(name, build)


def _rotary_tables(make: Maker, lengths, head_dim):
    positions = torch.cat([torch.arange(n, dtype=torch.float64, device="cpu") for n in lengths])
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()]).to(make.device, torch.float32)  # whatever the weights are


def cases() -> list[Case]:
    ragged = [_case(name, lengths, 2, 16) for name, lengths in AWKWARD_LENGTHS.items()]
    widths = [_case(f"head_dim_{d}", [5, 33], 2, d) for d in (8, 20, 64, 128)]
    turned = [_case(f"rotary_{d}", lengths, 2, d, rotary=True) for d, lengths in _ROTARY.items()]
    return [*ragged, *widths, _case("rotary", [5, 33], 2, 16, rotary=True), *turned]


# By head_dim, those of ESM-2's sizes; angles grow with the length, and with them what half tables would lose.
_ROTARY = {24: [1, 300], 32: [40, 0, 9], 64: [130, 5], 128: [33]}


def bench_cases(head_dim: int = 64) -> list[Case]:
    natural = [103, 187, 264, 351, 460, 683]
    points = {"natural": natural, "1x300": [300], "20x100": [100] * 20, "4x1022": [1022] * 4}
    return [_case(name, lengths, 20, head_dim) for name, lengths in points.items()]


def cost(x, cu_seqlens, heads, q_weight, **_) -> Cost:
    n, width = x.shape
    pairs = sum((end - start) ** 2 for start, end in spans(cu_seqlens))
    weights = 4 * width * width
    stream, half = x.numel() * x.element_size(), x.numel() * q_weight.element_size()
    moved = 2 * stream + weights * q_weight.element_size()
    # The normed rows, q, k, v and the attention's output, written and read; and the stream again, at the end.
    return Cost(2 * n * weights + 4 * pairs * width, moved, between=2 * 5 * half + stream)


def rotate(x, rotary):
    """Rotary position embedding (Su et al. 2021) in ESM-2's half-split form; rotary is (2, n, head_dim): cos, sin.

    It is computed in the tables' type, fp32, or x's where that is wider, and rounded once, to x's.
    """
    cos, sin = rotary.unsqueeze(2)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def compose(
    x,
    cu_seqlens,
    max_seqlen,
    ln_weight,
    ln_bias,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    v_weight,
    v_bias,
    out_weight,
    out_bias,
    heads,
    eps,
    rotary,
    return_qk,
    *,
    attention,
):
    """The op around any `attention_varlen`: what a backend uses that brings only an attention kernel."""
    n, width = x.shape
    normed = layer_norm(x, ln_weight, ln_bias, eps).to(q_weight.dtype)
    projections = (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias)
    q, k, v = (linear(normed, w, b).view(n, heads, width // heads) for w, b in projections)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    mixed = attention(q, k, v, cu_seqlens, max_seqlen, (width // heads) ** -0.5)
    out = (x + linear(mixed.reshape(n, width), out_weight, out_bias)).to(x.dtype)
    return (out, q, k) if return_qk else out


shapes = partial(compose, attention=attention_shapes)


@op(contract=CONTRACT, cases=cases, bench_cases=bench_cases, cost=cost, dtype_of="q_weight", shapes=shapes)
def pre_ln_attention(
    x,
    cu_seqlens,
    max_seqlen: int,
    ln_weight,
    ln_bias,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    v_weight,
    v_bias,
    out_weight,
    out_bias,
    heads: int,
    eps: float = 1e-5,
    rotary=None,
    return_qk: bool = False,
):
    """Self-attention block of a pre-LN transformer (Xiong et al. 2020).

    Args:
        x: (n, width), the residual stream, in fp32 (fp64) even when the weights are half: it is where errors add up.
        cu_seqlens: (sequences + 1,) int32; max_seqlen: the longest sequence.
        ln_weight, ln_bias: (width,); {q,k,v,out}_weight: (width, width); {q,k,v,out}_bias: (width,).
        rotary: None, or (2, n, head_dim) cosines and sines for rotary positions, always fp32: q and k are rotated in
            fp32 and rounded once.
        return_qk: also return q and k as the attention saw them, from which attention maps are made.

    Returns:
        (n, width) in x's dtype; with return_qk also q and k, each (n, heads, head_dim).
    """
    return compose(
        x,
        cu_seqlens,
        max_seqlen,
        ln_weight,
        ln_bias,
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        v_weight,
        v_bias,
        out_weight,
        out_bias,
        heads,
        eps,
        rotary,
        return_qk,
        attention=attention_varlen.reference,
    )
