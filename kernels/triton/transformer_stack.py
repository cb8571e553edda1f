"""All layers of a transformer, launch after launch: the kernels of `pre_ln_attention` and `gelu_ffn`, with their bits.

What depends on the model's sizes alone is bound once; a call's buffers are made once and used by every layer. Nothing
of the weights is kept from one call to the next, no address and no copy, so an edit cannot be missed.
"""

import functools
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from triton import cdiv

from esm_fast.ops import registry
from esm_fast.ops.checked import Checked
from esm_fast.ops.common import ALIGNMENT

from . import common, launch
from .attention_varlen import attention_forward
from .common import BACKEND, capability, padded, precision
from .configs import Config, attention_config, linear_config
from .gelu_ffn import gelu_ffn
from .launch import Bound
from .layer_norm import _CONFIG as NORM
from .layer_norm import _blocks, layer_norm_forward
from .linear import linear, tiles
from .pre_ln_attention import pre_ln_attention, qkv_projection
from .rotary import _CONFIG as ROTARY
from .rotary import _TOKENS, rotary


class Sizes(NamedTuple):
    width: int
    hidden: int
    heads: int
    dtype: torch.dtype
    arch: int
    precision: str


class _Kernels(NamedTuple):
    norm: Bound
    qkv: Bound
    turn: Bound | None
    attend: Bound
    out: Bound
    fc1: Bound
    fc2: Bound


class _Configs(NamedTuple):
    """Whose tiles the grids are made of."""

    qkv: Config
    attend: Config
    residual: Config
    gelu: Config


@functools.lru_cache(maxsize=32)
def _bound(sizes: Sizes, device: object, executor: object) -> tuple[_Kernels, _Configs]:
    """executor: what the device is, since compilations for a machine that is elsewhere are others."""
    width, hidden, heads, dtype, arch, precision = sizes
    head_dim, how = width // heads, {"PRECISION": precision}
    (rows, block), dim = _blocks(width), padded(head_dim)
    configs = _Configs(
        linear_config("qkv_projection", arch, dtype),
        attention_config("attention_forward", arch, dtype, dim),
        linear_config("linear_residual", arch, dtype),
        linear_config("linear_gelu", arch, dtype),
    )
    plus, turn = {"N": width, "THEN": "residual"} | how, None
    if head_dim % 2 == 0:
        half = head_dim // 2
        turned = dict(HEADS=heads, HALF=half, BACK=False, TOKENS=_TOKENS, BLOCK=padded(half))
        turn = Bound(rotary, turned, ROTARY, device)
    kernels = _Kernels(
        Bound(layer_norm_forward, dict(WIDTH=width, ROWS=rows, BLOCK=block), NORM, device),
        Bound(qkv_projection, {"WIDTH": width} | how, configs.qkv, device),
        turn,
        Bound(attention_forward, dict(HEADS=heads, HEAD_DIM=head_dim, DIM=dim) | how, configs.attend, device),
        Bound(linear, {"K": width} | plus, configs.residual, device),
        Bound(linear, {"N": hidden, "K": width, "THEN": "gelu"} | how, configs.gelu, device),
        Bound(linear, {"K": hidden} | plus, configs.residual, device),
    )
    return kernels, configs


@registry.stacks(BACKEND)
def stack(x, cu_seqlens, max_seqlen, layers, heads, rotary, kept) -> Iterator[torch.Tensor]:
    """The stream after each layer, as `registry.stacks` asks for it."""
    with torch.cuda.device_of(x), common.first_launches_told():
        given = [x, cu_seqlens] if rotary is None else [x, cu_seqlens, rotary]
        sizes = None if launch.watched() else _sizes(given, layers, heads)
        if sizes is None:
            yield from _by_halves(x, cu_seqlens, max_seqlen, layers, heads, rotary)
        else:
            yield from _launched(sizes, x, cu_seqlens, max_seqlen, layers, rotary, kept)


def _sizes(given: list[torch.Tensor], layers, heads: int) -> Sizes | None:
    """What launches are bound by; None where layers or tensors differ in more than their values."""
    x, fc1 = given[0], layers[0].fc1_weight
    hidden, width = fc1.shape
    if width * fc1.dtype.itemsize % ALIGNMENT:  # so that every row begins where a buffer may
        return None
    if x.dtype != torch.float32 or len({len(layer.fc1_bias) for layer in layers}) > 1:
        return None
    tensors = given
    if not (type(layers) is Checked and layers.even):
        of_layers = list(chain.from_iterable([layer.tensors for layer in layers]))
        if {tensor.dtype for tensor in of_layers} != {fc1.dtype}:
            return None
        tensors = given + of_layers
    if not all(map(torch.Tensor.is_contiguous, tensors)):
        return None
    if any(address % ALIGNMENT for address in map(torch.Tensor.data_ptr, tensors)):
        return None
    return Sizes(width, hidden, heads, fc1.dtype, capability(x), precision())


def _by_halves(x, cu_seqlens, max_seqlen, layers, heads, rotary) -> Iterator[torch.Tensor]:
    """Each half by itself, for weights of several types, or that are views."""
    for layer in layers:
        x = pre_ln_attention(x, cu_seqlens, max_seqlen, *layer.attention, heads, layer.attn_eps, rotary, False)
        x = gelu_ffn(x, *layer.ffn, layer.ffn_eps)
        yield x


def _launched(sizes: Sizes, x, cu_seqlens, max_seqlen, layers, turns, kept) -> Iterator[torch.Tensor]:
    width, hidden, heads, dtype, *_ = sizes
    device = launch.device()
    (norm, qkv, turn, attend, out, fc1, fc2), configs = _bound(sizes, device, common.elsewhere)
    n, stream = len(x), launch.stream_of(device)
    normed, mixed, projected = x.new_empty(5, n, width, dtype=dtype).split((1, 1, 3))
    q, k, v = projected.unbind()
    lse, inner = x.new_empty(heads, n), x.new_empty(n, hidden, dtype=dtype)
    between, spare = torch.empty_like(x), []
    norms, wide, tokens = cdiv(n, _blocks(width)[0]), tiles(configs.residual, n, width), cdiv(n, _TOKENS)
    projections, inners = tiles(configs.qkv, n, width), tiles(configs.gelu, n, hidden)
    of_one = cdiv(max_seqlen, configs.attend.tiles["BLOCK"])
    queries, scale = of_one * (len(cu_seqlens) - 1), (width // heads) ** -0.5
    for number, layer in enumerate(layers, start=1):
        ln, ln_bias, wq, bq, wk, bk, wv, bv, wo, bo, ln2, ln2_bias, w1, b1, w2, b2, eps, eps2 = layer
        norm.launch(norms, 1, stream, x, ln, ln_bias, normed, n, float(eps))
        qkv.launch(projections, 3, stream, normed, wq, wk, wv, bq, bk, bv, projected, n)
        if turns is not None:
            turn.launch(tokens, heads, stream, q, k, turns, n)
        attend.launch(queries, heads, stream, q, k, v, mixed, lse, cu_seqlens, n, of_one, scale)
        out.launch(wide, 1, stream, mixed, wo, bo, x, between, n)
        norm.launch(norms, 1, stream, between, ln2, ln2_bias, normed, n, float(eps2))
        fc1.launch(inners, 1, stream, normed, w1, b1, inner, inner, n)
        x = spare.pop() if spare else torch.empty_like(x)
        fc2.launch(wide, 1, stream, inner, w2, b2, between, x, n)
        yield x
        if number not in kept:
            spare.append(x)  # the next layer's first half reads it, and its second may write it
