"""transformer_stack: all layers of a transformer, one after the other; `pre_ln_attention` and `gelu_ffn`, composed."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from numbers import Integral
from typing import NamedTuple

import torch

from . import opaque
from .common import AWKWARD_LENGTHS, Maker, spans
from .contract import Contract, Records, Spec, floats, heads_of, longest, offsets, real, turns, weights
from .gelu_ffn import _case as ffn_case
from .gelu_ffn import cost as ffn_cost
from .gelu_ffn import gelu_ffn
from .pool import pool
from .pool_max import pool_max
from .pool_moments import pool_moments
from .pre_ln_attention import _case as attention_case
from .pre_ln_attention import cost as attention_cost
from .pre_ln_attention import pre_ln_attention
from .registry import REFERENCE, Case, Cost, op, select, stack_of


class LayerWeights(NamedTuple):
    """One layer's tensors, in the order of `pre_ln_attention` and then of `gelu_ffn`, and the eps of the two norms."""

    attn_ln_weight: torch.Tensor
    attn_ln_bias: torch.Tensor
    q_weight: torch.Tensor
    q_bias: torch.Tensor
    k_weight: torch.Tensor
    k_bias: torch.Tensor
    v_weight: torch.Tensor
    v_bias: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor
    ffn_ln_weight: torch.Tensor
    ffn_ln_bias: torch.Tensor
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor
    attn_eps: float = 1e-5
    ffn_eps: float = 1e-5

    @property
    def attention(self) -> tuple[torch.Tensor, ...]:
        return self[:10]

    @property
    def ffn(self) -> tuple[torch.Tensor, ...]:
        return self[10:16]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self[:16]

    @property
    def numbers(self) -> tuple[float, ...]:
        return self[16:]


POOLS = {"pool": pool, "pool_max": pool_max, "pool_moments": pool_moments}


class StackPool(NamedTuple):
    """A pooling of the stream after a layer (the first is 1), which then need not be kept.

    op: one of POOLS; rows: (n,), what that op takes beside the stream and cu_seqlens.
    """

    layer: int
    op: str
    rows: torch.Tensor


class _Pools(Spec):
    """Any number of StackPools, whose rows are what their ops take."""

    def problem(self, value, known) -> str | None:
        for number, wanted in enumerate(value, start=1):
            if not isinstance(wanted, StackPool) or wanted.op not in POOLS:
                return f"must be StackPools by {', '.join(POOLS)}, number {number} is {wanted!r:.60}"
            *_, rows = POOLS[wanted.op].contract.specs.values()
            if (problem := rows.problem(wanted.rows, known)) is not None:
                return f"are wrong: rows of number {number} {problem}"
        return None


def _layers_exist(known, layers, return_layers, pools, **_):
    for name, numbers in (("return_layers", return_layers), ("the layers of pools", [one.layer for one in pools])):
        if not all(isinstance(number, Integral) and 1 <= number <= len(layers) for number in numbers):
            return f"{name} must be from 1 to {len(layers)}, not {tuple(numbers)}"
    return None


CONTRACT = Contract(
    _layers_exist,
    x=floats("n", "width"),
    cu_seqlens=offsets("n"),
    max_seqlen=longest(),
    layers=Records(
        LayerWeights,
        noun="layer",
        own=("hidden",),
        attn_ln_weight=floats("width"),
        attn_ln_bias=floats("width"),
        q_weight=weights("width", "width"),
        q_bias=floats("width"),
        k_weight=weights("width", "width"),
        k_bias=floats("width"),
        v_weight=weights("width", "width"),
        v_bias=floats("width"),
        out_weight=weights("width", "width"),
        out_bias=floats("width"),
        ffn_ln_weight=floats("width"),
        ffn_ln_bias=floats("width"),
        fc1_weight=weights("hidden", "width"),
        fc1_bias=floats("hidden"),
        fc2_weight=weights("width", "hidden"),
        fc2_bias=floats("width"),
        attn_eps=real(),
        ffn_eps=real(),
    ),
    heads=heads_of("width"),
    rotary=turns("n"),
    pools=_Pools(),
)


def _case(name, lengths, heads, head_dim, hidden, depth, return_layers=(), rotary=False, pools=()) -> Case:
    def build(dtype, device, seed):
        halves = attention_case(name, lengths, heads, head_dim, rotary), ffn_case(name, 0, heads * head_dim, hidden)
        layers = []
        for number in range(depth):
            attention, ffn = (half.build(dtype, device, seed + number) for half in halves)
            layers.append(LayerWeights(**_tensors("attn", attention), **_tensors("ffn", ffn)))
        inputs = {name: attention[name] for name in ("x", "cu_seqlens", "max_seqlen", "rotary")}
        found = [_pool(layer, op, inputs, dtype, device, seed) for layer, op in pools]
        return dict(**inputs, layers=layers, heads=heads, return_layers=return_layers, pools=found)

    return Case(name, build)


def _pool(layer: int, name: str, inputs: dict, dtype, device, seed) -> StackPool:
    """Of all rows but each sequence's first, in different shares."""
    rows = Maker(dtype, device, seed).normal(len(inputs["x"]), dtype=inputs["x"].dtype).abs()
    rows[[start for start, end in spans(inputs["cu_seqlens"]) if end > start]] = 0
    return StackPool(layer, name, rows != 0 if name == "pool_max" else rows)


def _tensors(half: str, arguments: dict) -> dict[str, torch.Tensor]:
    """The weights among an op's arguments, named as `LayerWeights` names them."""
    names = [name for name in arguments if name.endswith(("_weight", "_bias"))]
    return {f"{half}_{name}" if name.startswith("ln_") else name: arguments[name] for name in names}


def cases() -> list[Case]:
    ragged = [_case(name, lengths, 2, 16, 80, 2) for name, lengths in AWKWARD_LENGTHS.items()]
    return [
        *ragged,
        _case("one_layer", [5, 33], 2, 20, 37, 1),
        _case("returned", [9, 30], 3, 8, 64, 4, return_layers=(1, 3, 4)),
        _case("rotary", [9, 0, 300, 30], 2, 16, 80, 2, return_layers=(1,), rotary=True),
        _case(
            "pooled", [9, 1, 70], 2, 8, 64, 3, (2,), True, [(n, op) for n in (1, 2, 3) for op in POOLS] + [(2, "pool")]
        ),
    ]


def bench_cases(head_dim: int = 64) -> list[Case]:
    return [_case(f"{n}_tokens", [n], 20, head_dim, 80 * head_dim, 2) for n in (10, 300)]


def cost(x, cu_seqlens, layers, heads, return_layers, pools=(), **_) -> Cost:
    flops = sum(POOLS[pool.op].cost(x=x, cu_seqlens=cu_seqlens).flops for pool in pools)
    # The stream is read and written once; between the layers it may stay in a cache.
    transferred = (2 + len(return_layers)) * x.numel() * x.element_size()
    for layer in layers:
        halves = (
            attention_cost(x=x, cu_seqlens=cu_seqlens, heads=heads, q_weight=layer.q_weight),
            ffn_cost(x=x, fc1_weight=layer.fc1_weight),
        )
        flops += sum(half.flops for half in halves)
        transferred += sum(half.bytes - 2 * x.numel() * x.element_size() for half in halves)
    return Cost(flops, transferred)


@op(contract=CONTRACT, cases=cases, bench_cases=bench_cases, cost=cost, dtype_of="layers", shapes=None)
def transformer_stack(
    x,
    cu_seqlens,
    max_seqlen,
    layers: Sequence[LayerWeights],
    heads,
    return_layers=(),
    rotary=None,
    pools: Sequence[StackPool] = (),
):
    """Every layer of a pre-LN transformer: attention block, feed-forward block, next layer.

    Args:
        x: (n, width), the residual stream, fp32 (fp64) even when the weights are half.
        cu_seqlens: (sequences + 1,) int32; max_seqlen: the longest sequence.
        layers: the layers' weights, at least one.
        return_layers: numbers of layers (the first is 1) after which the stream is wanted too.
        rotary: None, or the tables of `pre_ln_attention`, the same in all layers.
        pools: what is pooled of the stream as it goes by.

    Returns:
        The stream after the last layer, then those after `return_layers` in their order, each (n, width); then what
        `pools` made, in their order.
    """
    after, pooled = {}, [None] * len(pools)
    for number, layer in enumerate(layers, start=1):
        half = dict(heads=heads, eps=layer.attn_eps, rotary=rotary)
        x = pre_ln_attention.reference(x, cu_seqlens, max_seqlen, *layer.attention, **half)
        x = gelu_ffn.reference(x, *layer.ffn, eps=layer.ffn_eps)
        if number in return_layers:
            after[number] = x
        for place, (layer_of_pool, op_name, rows) in enumerate(pools):
            if layer_of_pool == number:
                pooled[place] = POOLS[op_name].reference(x, cu_seqlens, rows)
    return x, *(after[number] for number in return_layers), *pooled


def stack_call(backend: str | None, **arguments) -> Callable | None:
    """The call of all layers, checked once and its kernels chosen once: one of a kernel for all of them, or of the two
    that its halves are computed by, with the bits that they have one by one. None where gradients are due and while
    torch.compile traces, which see the halves."""
    if torch.compiler.is_compiling():
        return None
    arguments = transformer_stack.bind((), arguments)
    tensors = transformer_stack.check(**arguments)
    request = transformer_stack.request(arguments, tensors)
    if request.grad or opaque.why(tensors) is not None:
        return None
    kernel = select("transformer_stack", request, backend)
    if kernel.backend != REFERENCE and backend in (None, kernel.backend):
        return partial(kernel.forward, *arguments.values())
    stack, _ = halves_of(arguments["layers"], request, backend)
    return partial(_through, stack, backend, **arguments)


def halves_of(layers, request, backend: str | None) -> tuple[Callable, Hashable]:
    """(what runs the layers by the kernels that are chosen for their halves, as `registry.stacks` has it; which)."""
    chosen = {}
    for key in {(layer.q_weight.dtype, layer.fc1_weight.dtype) for layer in layers}:
        attention = select("pre_ln_attention", request._replace(dtype=key[0]), backend)
        chosen[key] = attention, select("gelu_ffn", request._replace(dtype=key[1], head_dim=None), backend)
    which = frozenset(chain.from_iterable(chosen.values()))
    return stack_of(*which) or partial(_by_halves, chosen), which


def _by_halves(chosen: dict, x, cu_seqlens, max_seqlen, layers, heads, rotary, kept) -> Iterator[torch.Tensor]:
    """As `registry.stacks` has it, of any two backends."""
    for layer in layers:
        attention, ffn = chosen[layer.q_weight.dtype, layer.fc1_weight.dtype]
        x = attention.forward(x, cu_seqlens, max_seqlen, *layer.attention, heads, layer.attn_eps, rotary, False)
        x = ffn.forward(x, *layer.ffn, layer.ffn_eps)
        yield x


def _through(stack: Callable, backend, x, cu_seqlens, max_seqlen, layers, heads, return_layers, rotary, pools):
    streams = stack(x, cu_seqlens, max_seqlen, layers, heads, rotary, frozenset(return_layers))
    return pooled_through(enumerate(streams, start=1), backend, x, cu_seqlens, return_layers, pools)


def pooled_through(streams: Iterable, backend, x, cu_seqlens, return_layers, pools):
    """What the op returns, from (number, stream) of layers as they go by; x: the first one's input."""
    after, pooled = {}, [None] * len(pools)
    for number, x in streams:
        if number in return_layers:
            after[number] = x
        for place, wanted in enumerate(pools):
            if wanted.layer == number:
                pooled[place] = POOLS[wanted.op](x, cu_seqlens, wanted.rows, backend=backend)
    return x, *(after[number] for number in return_layers), *pooled
