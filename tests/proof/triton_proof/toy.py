"""A small kernel over packed sequences with faults to plant: what the checks must catch, each by its name."""

import inspect

import torch
import triton
import triton.language as tl

from esm_fast.ops.common import AWKWARD_LENGTHS, Maker, spans
from esm_fast.ops.contract import Contract, floats, offsets
from esm_fast.ops.registry import Case, Cost, Kernel, Op

TILE = 16


@triton.jit
def times_sum(x, out, cu_seqlens, stride, WIDTH: tl.constexpr, TILE: tl.constexpr, FAULT: tl.constexpr):
    """out = x * (sum of x over the rows of its sequence), one program a tile of rows of one sequence."""
    sequence = tl.program_id(1)
    begin = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1)
    first = begin + tl.program_id(0) * (TILE - 1 if FAULT == "overlapping tiles" else TILE)
    if first >= end:
        return
    if FAULT == "off by one in cu_seqlens":
        end += 1
    column = tl.arange(0, WIDTH)
    row_stride = stride + 1 if FAULT == "wrong stride" else stride
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(begin, end, TILE):
        row = start + tl.arange(0, TILE)[:, None]
        place = x + row * row_stride + column[None, :]
        if FAULT == "dropped mask":
            part = tl.load(place)
        elif FAULT == "no other":
            part = tl.load(place, mask=row < end)
        elif FAULT == "masked by a product":
            rows_in_all = tl.load(cu_seqlens + tl.num_programs(1))
            part = tl.load(place, mask=row < rows_in_all, other=0.0) * (row < end).to(x.dtype.element_ty)
        else:
            part = tl.load(place, mask=row < end, other=0.0)
        total += tl.sum(part.to(tl.float32), 0)
    row = first + tl.arange(0, TILE)[:, None]
    mine = tl.load(x + row * stride + column[None, :], mask=row < end, other=0.0).to(tl.float32)
    if FAULT == "reads another program's result":
        mine += 0.0 * tl.load(out + begin * WIDTH + column)[None, :].to(tl.float32)
    last = end - 1 if FAULT == "unwritten row" else end
    if FAULT == "atomic update":
        tl.atomic_add(out + row * WIDTH + column[None, :], (mine * total).to(out.dtype.element_ty), mask=row < last)
    elif FAULT == "dropped store mask":
        tl.store(out + row * WIDTH + column[None, :], (mine * total).to(out.dtype.element_ty))
    else:
        tl.store(out + row * WIDTH + column[None, :], (mine * total).to(out.dtype.element_ty), mask=row < last)


def reference(x, cu_seqlens):
    parts = [x[a:b] * x[a:b].to(torch.promote_types(x.dtype, torch.float32)).sum(0) for a, b in spans(cu_seqlens)]
    return torch.cat(parts).to(x.dtype)


def launch(x, cu_seqlens, fault="none"):
    out = torch.empty(x.shape, dtype=x.dtype)
    grid = (triton.cdiv(len(x), TILE), len(cu_seqlens) - 1)
    times_sum[grid](x, out, cu_seqlens, x.stride(0), x.shape[1], TILE, fault)
    return out


def _case(name, lengths) -> Case:
    def build(dtype, device, seed):
        make = Maker(dtype, device, seed)
        return dict(x=make.normal(sum(lengths), 32), cu_seqlens=make.cu_seqlens(lengths))

    return Case(name, build)


def cases() -> list[Case]:
    return [_case(name, lengths) for name, lengths in AWKWARD_LENGTHS.items()]


def cost(x, cu_seqlens) -> Cost:
    return Cost(2 * x.numel(), 2 * x.numel() * x.element_size())


CONTRACT = Contract(x=floats("n", "width"), cu_seqlens=offsets("n"))
OP = Op("times_sum", reference, CONTRACT, cases, cases, cost, "x", inspect.signature(reference))


def kernel(fault: str = "none") -> Kernel:
    return Kernel(OP.name, "triton", lambda *arguments: launch(*arguments, fault))
