"""Rotary positions (Su et al. 2021) in ESM-2's half-split form, on q and k in place, and the way back for gradients."""

import torch
import triton
import triton.language as tl

from .common import NAMES, padded, spec
from .configs import Config

_TOKENS = 32
_CONFIG = Config({}, 4, 1)


@triton.jit
def _turn(P, cos1, cos2, sin1, sin2, exist, HALF: tl.constexpr, BACK: tl.constexpr):
    first = tl.load(P, mask=exist, other=0.0).to(tl.float32)
    second = tl.load(P + HALF, mask=exist, other=0.0).to(tl.float32)
    if BACK:
        turned1, turned2 = first * cos1 + second * sin2, second * cos2 - first * sin1
    else:
        turned1, turned2 = first * cos1 - second * sin1, second * cos2 + first * sin2
    tl.store(P, turned1.to(P.dtype.element_ty), mask=exist)
    tl.store(P + HALF, turned2.to(P.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["n"])
def rotary(
    Q, K, TABLES, n, HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of one head; BACK multiplies by the transpose, as gradients are."""
    row = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    exist = (row < n) & (column < HALF)
    table = TABLES + row * (2 * HALF) + column
    cos1 = tl.load(table, mask=exist, other=0.0).to(tl.float32)
    cos2 = tl.load(table + HALF, mask=exist, other=0.0).to(tl.float32)
    table += n.to(tl.int64) * (2 * HALF)
    sin1 = tl.load(table, mask=exist, other=0.0).to(tl.float32)
    sin2 = tl.load(table + HALF, mask=exist, other=0.0).to(tl.float32)
    at = (row * HEADS + tl.program_id(1)) * (2 * HALF) + column
    _turn(Q + at, cos1, cos2, sin1, sin2, exist, HALF, BACK)
    _turn(K + at, cos1, cos2, sin1, sin2, exist, HALF, BACK)


def rotate(q, k, tables, *, back=False) -> None:
    """Rotates contiguous (n, heads, head_dim) tensors in place; tables are (2, n, head_dim) cosines and sines."""
    n, heads, head_dim = q.shape
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head_dim, this is {head_dim}")
    half = head_dim // 2
    grid = (triton.cdiv(n, _TOKENS), heads)
    rotary[grid](q, k, tables, n, heads, half, back, _TOKENS, padded(half), **_CONFIG.launch)


def rotary_grad(q, k, dq, dk):
    """The tables' gradient, from q and k before the rotation: (2, n, head_dim) in fp32. Rare, so it is torch's."""

    def along(x, dx):
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return torch.stack([(x.float() * dx.float()).sum(1), (turned * dx.float()).sum(1)])

    return along(q, dq) + along(k, dk)


def compile_specs(capability: int) -> list:
    """Heads of 64; the table is the same everywhere."""
    return [
        spec(
            rotary,
            f"*{name} *{name} *{name} i32",
            dict(HEADS=20, HALF=32, BACK=back, TOKENS=_TOKENS, BLOCK=padded(32)),
            _CONFIG,
            direction="bwd" if back else "fwd",
            dtype=dtype,
        )
        for dtype, name in NAMES.items()
        for back in (False, True)
    ]
