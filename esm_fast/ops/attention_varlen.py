"""attention_varlen: softmax(scale q k^T) v within each packed sequence, all heads, no padding."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .common import AWKWARD_LENGTHS, Maker, spans
from .contract import Contract, alike, factor, longest, offsets
from .opaque import transformed
from .registry import Case, Cost, op

CONTRACT = Contract(
    q=alike("n", "heads", "head_dim"),
    k=alike("n", "heads", "head_dim"),
    v=alike("n", "heads", "head_dim"),
    cu_seqlens=offsets("n"),
    max_seqlen=longest(),
    scale=factor(),
)


def _case(name, lengths, heads, head_dim) -> Case:
    def build(dtype, device, seed):
        make = Maker(dtype, device, seed)
        # Scores of spread ~4 make the softmax far from uniform.
        q, k, v = (make.normal(sum(lengths), heads, head_dim, scale=s) for s in (2.0, 2.0, 1.0))
        return dict(q=q, k=k, v=v, cu_seqlens=make.cu_seqlens(lengths), max_seqlen=max(lengths), scale=head_dim**-0.5)

    return Case(name, build)


def cases() -> list[Case]:
    ragged = [_case(name, lengths, 2, 64) for name, lengths in AWKWARD_LENGTHS.items()]
    widths = [_case(f"head_dim_{d}", [5, 33, 18], 3, d) for d in (8, 16, 20, 32, 128)]
    return ragged + widths


def bench_cases(head_dim: int = 64) -> list[Case]:
    natural = [103, 187, 264, 351, 460, 683]
    return [_case("8x256", [256] * 8, 20, head_dim), _case("natural", natural, 20, head_dim)]


def cost(q, k, v, cu_seqlens, max_seqlen, scale) -> Cost:
    pairs = sum((end - start) ** 2 for start, end in spans(cu_seqlens))
    return Cost(4 * pairs * q.shape[1] * q.shape[2], 4 * q.numel() * q.element_size())


def shapes(q, k, v, cu_seqlens, max_seqlen, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@op(contract=CONTRACT, cases=cases, bench_cases=bench_cases, cost=cost, dtype_of="q", shapes=shapes)
def attention_varlen(q, k, v, cu_seqlens, max_seqlen: int, scale: float):
    """Bidirectional attention (Vaswani et al. 2017) within each sequence.

    Args:
        q, k, v: (n, heads, head_dim), the rows of all sequences one after the other.
        cu_seqlens: (sequences + 1,) int32, where each begins; max_seqlen: the longest.
        scale: factor on q k^T, head_dim ** -0.5 in ESM-1b.

    Returns:
        (n, heads, head_dim) in q's dtype. The softmax is in fp32 or better.
    """
    lengths, out = cu_seqlens.diff().tolist(), []
    # Split, not sliced: the gradient of each slice would be as large as the whole batch.
    with sdpa_kernel(SDPBackend.MATH) if transformed() else nullcontext():
        for qkv in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            qkv = (t.transpose(0, 1).unsqueeze(0) for t in qkv)
            out.append(F.scaled_dot_product_attention(*qkv, scale=scale)[0].transpose(0, 1))
    return torch.cat(out) if out else torch.zeros_like(q)
