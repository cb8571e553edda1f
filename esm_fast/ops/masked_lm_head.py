"""masked_lm_head: dense, GELU, LN, projection on the tied token table; and the loss, on the masked rows only."""

import torch
import torch.nn.functional as F

from .common import Maker, accumulate_dtype, gelu, layer_norm, linear
from .contract import INTEGERS, Contract, Indices, floats, indices, real, weights
from .registry import Case, Cost, op

IGNORED = -100  # the target of a row that adds nothing to the loss, as for torch's cross-entropy


def _between(known, rows, targets, x, **_):
    """rows: numbers, negative ones counted from the last, or one flag a row; as torch indexes."""
    if targets is None:
        return None
    if rows is None:
        return "targets need the rows they belong to"
    count = int(rows.sum()) if rows.dtype == torch.bool else len(rows)
    return None if len(targets) == count else f"targets must be one for each of the {count} rows, got {len(targets)}"


def _rows_exist(rows, known):
    n = known.sizes["n"]
    if rows.dtype == torch.bool:
        return None if len(rows) == n else f"must have a flag for each of the {n} rows, not {len(rows)}"
    low, high = (bound.item() for bound in rows.aminmax()) if len(rows) else (0, -1)
    return None if low >= -n and high < n else f"must be from {-n} to {n - 1}, and holds {low} to {high}"


CONTRACT = Contract(
    _between,
    x=floats("n", "width"),
    dense_weight=weights("width", "width"),
    dense_bias=floats("width"),
    ln_weight=floats("width"),
    ln_bias=floats("width"),
    token_table=weights("vocabulary", "width"),
    bias=floats("vocabulary"),
    rows=Indices("m", dtypes=INTEGERS | {torch.bool}, optional=True, inside=_rows_exist),
    targets=indices("targets", below="vocabulary", ignored=IGNORED, optional=True),
    eps=real(),
)


def _case(name, n, width, masked=None) -> Case:
    def build(dtype, device, seed):
        make = Maker(dtype, device, seed)
        return dict(
            x=make.normal(n, width),
            dense_weight=make.weight(width, width),
            dense_bias=make.normal(width, scale=0.1),
            ln_weight=make.gain(width),
            ln_bias=make.normal(width, scale=0.1),
            token_table=make.weight(33, width),
            bias=make.normal(33, scale=0.1),
            rows=None if masked is None else make.integers(0, n, masked).long(),
            targets=None if masked is None else make.integers(4, 29, masked).long(),
        )

    return Case(name, build)


def cases() -> list[Case]:
    return [_case("one_row", 1, 32), _case("all_rows", 33, 64), _case("masked_rows", 65, 40, masked=9)]


def bench_cases() -> list[Case]:
    return [_case("1024_rows", 1024, 1280), _case("150_of_1024", 1024, 1280, masked=150), _case("1_row", 1, 1280)]


def cost(x, dense_weight, token_table, rows, **_) -> Cost:
    n = x.shape[0] if rows is None else rows.numel()
    weights = dense_weight.numel() + token_table.numel()
    size, (vocabulary, width) = dense_weight.element_size(), token_table.shape
    moved = n * width * x.element_size() + (n * vocabulary + weights) * size
    return Cost(2 * n * weights, moved, between=2 * n * width * size)  # the dense layer's rows, under their norm


def unpack(outputs):
    return (*outputs, None)[:2]  # without targets there is no loss


@op(contract=CONTRACT, cases=cases, bench_cases=bench_cases, cost=cost, dtype_of="dense_weight", unpack=unpack)
def masked_lm_head(
    x, dense_weight, dense_bias, ln_weight, ln_bias, token_table, bias, rows=None, targets=None, eps: float = 1e-5
):
    """RoBERTa's language-model head (Liu et al. 2019).

    Args:
        x: (n, width), the final representation.
        dense_weight (width, width), dense_bias, ln_weight, ln_bias (width,), token_table (vocabulary, width), bias.
        rows: (m,) integers, the rows to compute, negative ones counted from the last; or (n,) bool; None for all.
        targets: (m,) integers, the right token of each of these rows, or IGNORED.

    Returns:
        (logits, loss): logits (m or n, vocabulary) in the weights' dtype; loss the SUM of the cross-entropies in fp32
        (divide by the number of masked tokens over all workers), or None without targets.
    """
    if rows is not None:
        x = x[rows]
    hidden = gelu(linear(x.to(dense_weight.dtype), dense_weight, dense_bias))
    normed = layer_norm(hidden, ln_weight, ln_bias, eps).to(token_table.dtype)
    logits = linear(normed, token_table, bias)
    if targets is None:
        return logits, None
    wide = logits.to(accumulate_dtype(logits.dtype))
    return logits, F.cross_entropy(wide, targets.long(), reduction="sum").to(
        torch.promote_types(wide.dtype, torch.float32)
    )
