"""embedding: token and position tables, token-dropout scale per sequence, optional layer norm."""

import torch
import torch.nn.functional as F

from ..alphabet import MASK, PAD
from .common import AWKWARD_LENGTHS, Maker, accumulate_dtype, layer_norm, spans
from .contract import Contract, flag, floats, indices, offsets, real, weights
from .registry import Case, Cost, op

# Of the tokens seen in pretraining, 15 % were selected and 80 % of these shown as <mask>, whose embedding is zero.
KEPT_IN_TRAINING = 1 - 0.15 * 0.8


def _both_or_none(known, ln_weight, ln_bias, **_):
    return "ln_weight and ln_bias must be both given or both None" if (ln_weight is None) != (ln_bias is None) else None


CONTRACT = Contract(
    _both_or_none,
    tokens=indices("n", below="vocabulary"),
    positions=indices("n", below="max_positions"),
    cu_seqlens=offsets("n"),
    token_table=weights("vocabulary", "width"),
    position_table=weights("max_positions", "width", optional=True),
    ln_weight=floats("width", optional=True),
    ln_bias=floats("width", optional=True),
    token_dropout=flag(),
    scale=floats("sequences", optional=True),
    eps=real(),
)


def _case(name, lengths, width, *, norm=True, token_dropout=True, table=True) -> Case:
    def build(dtype, device, seed):
        make = Maker(dtype, device, seed)
        n = sum(lengths)
        tokens = make.integers(4, 33, n)  # 32 is <mask>
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        starts = [end - length for end, length in zip(ends, lengths, strict=True)]
        tokens[[start for start, length in zip(starts, lengths, strict=True) if length]] = 0
        positions = torch.cat([torch.arange(2, 2 + n, dtype=torch.int32, device="cpu") for n in lengths]).to(device)
        return dict(
            tokens=tokens,
            positions=positions,
            cu_seqlens=make.cu_seqlens(lengths),
            token_table=make.normal(33, width),
            position_table=make.normal(max(lengths) + 2, width) if table else None,
            ln_weight=make.gain(width) if norm else None,
            ln_bias=make.normal(width, scale=0.1) if norm else None,
            token_dropout=token_dropout,
        )

    return Case(name, build)


def cases() -> list[Case]:
    ragged = [_case(name, lengths, 32) for name, lengths in AWKWARD_LENGTHS.items()]
    return [
        *ragged,
        _case("no_positions", [5, 9, 0, 1], 24, norm=False, table=False),
        _case("no_norm", [5, 9], 24, norm=False),
        _case("no_token_dropout", [5, 9], 24, token_dropout=False),
    ]


def bench_cases() -> list[Case]:
    return [_case("2048_rows", [512] * 4, 1280), _case("300_rows", [300], 1280)]


def cost(tokens, cu_seqlens, token_table, **_) -> Cost:
    n, (vocabulary, width) = tokens.numel(), token_table.shape
    rows = min(n, vocabulary) + max((end - start for start, end in spans(cu_seqlens)), default=0)  # of both tables
    return Cost(10 * n * width, (4 * n + rows * token_table.element_size()) * width)


def token_dropout_scale(tokens, cu_seqlens, dtype=torch.float32):
    """What embeddings are multiplied by, per sequence, to make up for the <mask> tokens it shows: (sequences,)."""
    lengths = cu_seqlens.diff().long()
    numbers = torch.arange(len(lengths), dtype=torch.int64, device=tokens.device)
    owner = torch.repeat_interleave(numbers, lengths, output_size=len(tokens))  # or it would wait for a GPU's sum
    masked = torch.zeros(len(lengths), dtype=torch.float32, device=tokens.device).index_add_(
        0, owner, (tokens == MASK).float()
    )
    return KEPT_IN_TRAINING / (1 - masked / lengths).to(dtype)  # the share is in fp32 in every reference


def added(positions, token_table, position_table):
    """(positions, table) for kernels that always add a row: where there is no table, rows of zeros, which add nothing.
    There is one for <pad>, too, whose gradient kernels clear."""
    if position_table is not None:
        return positions, position_table
    return torch.zeros_like(positions), token_table.new_zeros(PAD + 1, token_table.shape[1])


def shapes(tokens, positions, cu_seqlens, token_table, *_):
    dtype = accumulate_dtype(token_table.dtype)
    return token_table.new_empty(tokens.shape[0], token_table.shape[1], dtype=dtype)


@op(contract=CONTRACT, cases=cases, bench_cases=bench_cases, cost=cost, dtype_of="token_table", shapes=shapes)
def embedding(
    tokens,
    positions,
    cu_seqlens,
    token_table,
    position_table=None,
    ln_weight=None,
    ln_bias=None,
    token_dropout: bool = True,
    scale=None,
    eps: float = 1e-5,
):
    """ESM-1b's input embedding: LN(scale * E[token] + P[position]).

    Args:
        tokens, positions: (n,) int32; positions index the table directly (the first token of a sequence has 2).
        cu_seqlens: (sequences + 1,) int32.
        token_table: (33, width); position_table: (max_positions + 2, width), or None for ESM-2, whose positions are
            rotary: nothing is added then.
        ln_weight, ln_bias: (width,), or None for ESM-1v, which has no layer norm here.
        token_dropout: zero <mask> embeddings and scale each sequence by 0.88 / (1 - its share of <mask> tokens).
        scale: (sequences,), to replace that factor where a caller counts tokens in its own way.

    Returns:
        (n, width) in fp32 (fp64 for fp64): the residual stream.
    """
    wide = accumulate_dtype(token_table.dtype)
    x = F.embedding(tokens, token_table, padding_idx=PAD).to(wide)
    if token_dropout:
        if scale is None:
            scale = token_dropout_scale(tokens, cu_seqlens, wide)
        per_token = torch.repeat_interleave(scale.to(wide), cu_seqlens.diff().long(), output_size=len(tokens))
        x = (x * per_token[:, None]).masked_fill((tokens == MASK)[:, None], 0.0)
    if position_table is not None:
        x = x + F.embedding(positions, position_table, padding_idx=PAD).to(wide)
    return x if ln_weight is None else layer_norm(x, ln_weight, ln_bias, eps).to(wide)
