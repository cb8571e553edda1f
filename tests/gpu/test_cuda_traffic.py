"""What the CUDA kernels move, counted by the emulator at ESM-1b's width: whole sectors, wide packs, nothing twice."""

from typing import NamedTuple

import pytest
import torch
from cuda_emulator.emulator import Emulator, figures
from esm_fast.kernels.cuda import contact_map
from esm_fast.kernels.cuda.attention_varlen import attend, attend_backward
from esm_fast.kernels.cuda.bias_gelu import bias_gelu, bias_gelu_grads
from esm_fast.kernels.cuda.common import executed_by
from esm_fast.kernels.cuda.embedding import embedding
from esm_fast.kernels.cuda.layer_norm import layer_norm, layer_norm_grads
from esm_fast.kernels.cuda.masked_lm_head import cross_entropy, cross_entropy_grads
from esm_fast.kernels.cuda.masked_softmax import masked_softmax

HALF = torch.float16


class Moved(NamedTuple):
    """requested: bytes of all sectors that warps ask for, over the fewest bytes; distinct: each address once a launch,
    as if caches kept the rest; sectors: bytes asked for over those of their sectors; wide: share of the bytes that
    lanes move 16 at a time."""

    requested: float
    distinct: float
    sectors: float
    wide: float


def moved(library, run, *tensors) -> Moved:
    """`tensors`: all inputs and outputs, which must be moved once."""
    with executed_by(Emulator(library, traffic=True)) as emulator:
        results = run()
    outputs = [t for t in (results if isinstance(results, tuple) else (results,)) if isinstance(t, torch.Tensor)]
    fewest = sum(t.nbytes for t in (*tensors, *outputs))
    loads_and_stores = [part for _, result in emulator.counted for part in figures(result)]
    total = {name: sum(part[name] for part in loads_and_stores) for name in loads_and_stores[0]}
    asked = 32 * total["sectors"]
    wide = 1 - total["narrow_bytes"] / total["bytes"]
    return Moved(asked / fewest, total["distinct_bytes"] / fewest, total["bytes"] / asked, wide)


def calls() -> dict:
    """(what to run, its inputs), of half weights and, where there is one, an fp32 stream."""
    rows, width = 128, 1280
    x, along = torch.randn(2, rows, width)
    half, dy = torch.randn(2, rows, width).half()
    gain, bias = torch.randn(width).half(), torch.randn(width).half()
    statistics = torch.randn(rows, 2)
    scores, lengths = torch.randn(1, 2, 256, 256).half(), torch.tensor([250], dtype=torch.int32)
    tokens, positions = torch.randint(4, 24, (rows,)).int(), (torch.arange(rows) + 2).int()
    ends, table, places = torch.tensor([0, rows], dtype=torch.int32), *torch.randn(2, 130, width).half()
    logits, targets = torch.randn(640, 33).half(), torch.randint(4, 24, (640,))
    loss = torch.ones(1)
    q, k, v, out, grad = torch.randn(5, 256, 4, 64).half()
    one, lse = torch.tensor([0, 256], dtype=torch.int32), torch.zeros(4, 256)
    keep, weight, sums, maps = (
        torch.ones(256, dtype=torch.bool),
        torch.randn(4),
        torch.rand(4, 256),
        torch.randn(256**2),
    )
    contacts = (q, k, one, 256, 256**2, keep, weight, 0.125)
    return {
        "attention": (lambda: attend(q, k, v, one, 256, 0.125), q, k, v),
        "attention backward": (
            lambda: attend_backward(q, k, v, out, lse, grad, one, 256, 0.125),
            *(q, k, v, out, lse, grad),
        ),
        "contact_map": (lambda: contact_map._train(*contacts)[0], *contacts[:2], keep),
        "contact_map backward": (
            lambda: tuple(contact_map._backward(contacts, (lse, sums), (maps,))),
            *(*contacts[:2], keep, maps),
        ),
        "layer_norm": (lambda: layer_norm(x, gain, bias, 1e-5), x, gain, bias),
        "layer_norm backward": (
            lambda: layer_norm_grads(x, gain, dy, statistics, along),
            *(x, gain, dy, statistics, along),
        ),
        "bias_gelu": (lambda: bias_gelu(half, bias), half, bias),
        "bias_gelu backward": (lambda: bias_gelu_grads(half, bias, dy), half, bias, dy),
        "masked_softmax": (lambda: masked_softmax(scores, lengths), scores),
        "embedding": (
            lambda: embedding(tokens, positions, ends, table, places, gain, bias, True, None, 1e-5),
            *(tokens, positions, table[:20], places[:rows]),
        ),
        "cross_entropy": (lambda: cross_entropy(logits, targets), logits, targets),
        "cross_entropy backward": (lambda: cross_entropy_grads(logits, targets, loss), logits, targets),
    }


# Above 1.3 here: each of the four tiles of attention asks for all keys and values, and its backward pass consists of
# two that read the same; so do contacts, in several passes each way.
CACHED = {"attention", "attention backward", "contact_map", "contact_map backward"}
DISTINCT = {"attention backward": 1.6, "contact_map": 2.2, "contact_map backward": 3.3}
# Lanes move 16 bytes, but for what is one number a row, and contacts, whose rows may begin at any element.
WIDE = {"cross_entropy": 0.84, "contact_map": 0.81, "contact_map backward": 0.32}


@pytest.mark.parametrize("name", calls())
def test_traffic(name, cuda_library):
    figure = moved(cuda_library, *calls()[name])
    print(name, figure)
    assert figure.sectors > 0.93
    assert figure.requested < 1.3 or name in CACHED
    assert figure.distinct < DISTINCT.get(name, 1.3)
    assert figure.wide > WIDE.get(name, 0.91)
