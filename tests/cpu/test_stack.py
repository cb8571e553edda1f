"""The whole stack in one call: the layers' own results bit for bit, and run by the model where it should be."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_levels import HALF_AND_FULL, kernel, run

from esm_fast import ops
from esm_fast.models.esm1 import ESM1, Config
from esm_fast.ops import OPS, registry, verify
from esm_fast.ops.registry import REFERENCE, Kernel
from esm_fast.ops.transformer_stack import _case
from esm_fast.sequences import batching

LENGTHS = [9, 1, 0, 150, 40]


def arguments(dtype, lengths=LENGTHS, depth=3, return_layers=(2, 1), head_dim=24, rotary=False):
    case = _case("ragged", lengths, 2, head_dim, 100, depth, return_layers, rotary)
    return verify.bound(ops.transformer_stack, case.build(dtype, "cpu", 0))


def layer_by_layer(x, cu_seqlens, max_seqlen, layers, heads, return_layers, rotary, pools):
    after = []
    for layer in layers:
        attention = kernel("pre_ln_attention").forward
        x = attention(x, cu_seqlens, max_seqlen, *layer.attention, heads, layer.attn_eps, rotary, False)
        x = kernel("gelu_ffn").forward(x, *layer.ffn, layer.ffn_eps)
        after.append(x)
    pooled = (kernel(name).forward(after[number - 1], cu_seqlens, rows) for number, name, rows in pools)
    return [x, *(after[number - 1] for number in return_layers), *pooled]


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


# --- the same bits as the layers one by one --------------------------------------------------------------------------


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_the_bits_of_the_layers_one_by_one(isa, threads, dtype, rotary):  # noqa: F811
    """Many rows, few rows, and heads few enough for several threads to share the queries of one."""
    for lengths, n in itertools.product((LENGTHS, [5], [300]), (1, 2, 16)):
        threads(n)
        values = arguments(dtype, lengths, rotary=rotary)
        found = run("transformer_stack", **values)
        assert same(found, layer_by_layer(**values)), (lengths, n)
        rows = values["x"][:, 0].abs()
        taken = {"pool": rows, "pool_max": rows > 0.1, "pool_moments": rows}
        pools = [ops.StackPool(number, name, taken[name]) for number in (3, 1) for name in taken]
        pooled = values | {"pools": pools}
        assert same(run("transformer_stack", **pooled), layer_by_layer(**pooled)), (lengths, n)
        # A stack that drops the positions is caught here and above: it is right without them.
        assert not rotary or lengths == [5] or not same(found, run("transformer_stack", **values | {"rotary": None}))


def test_own_eps_and_a_width_of_its_own_for_every_layer():
    values = arguments(torch.float32)
    first, second, _ = values["layers"]
    narrow = dict(fc1_weight=first.fc1_weight[:33], fc1_bias=first.fc1_bias[:33], fc2_weight=first.fc2_weight[:, :33])
    values["layers"] = [first._replace(**narrow, attn_eps=1e-2), second._replace(ffn_eps=0.3)]
    found = run("transformer_stack", **values)
    assert same(found, layer_by_layer(**values))
    torch.testing.assert_close(found[0], ops.transformer_stack.reference(**values)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_a_protein_has_the_same_bits_in_any_batch(threads, dtype):  # noqa: F811
    values = arguments(dtype)
    counted = values["x"][:, 0] > -1
    taken = {"pool": counted / 3, "pool_max": counted, "pool_moments": counted / 2}

    def through(start, end, ends):
        pools = [ops.StackPool(2, name, rows[start:end]) for name, rows in taken.items()]
        ends = torch.tensor(ends, dtype=torch.int32)
        part = {"x": values["x"][start:end], "cu_seqlens": ends, "max_seqlen": int(ends.diff().max()), "pools": pools}
        found = run("transformer_stack", **values | part)
        return found[:-3], found[-3:]

    together, pooled = through(0, sum(LENGTHS), values["cu_seqlens"].tolist())
    for n in (1, 3):
        threads(n)
        for i, (start, end) in enumerate(itertools.pairwise(values["cu_seqlens"].tolist())):
            alone, pooled_alone = through(start, end, [0, end - start])
            assert same(alone, [out[start:end] for out in together])
            assert same(pooled_alone, [out[i : i + 1] for out in pooled])


def test_callers_at_once_and_a_fork_get_the_same_bits():
    """One caller has the pool for a whole stack, the others work alone; a forked child starts its own."""
    values = arguments(torch.bfloat16)
    alone = run("transformer_stack", **values)
    with ThreadPoolExecutor(3) as callers:
        runs = [callers.submit(run, "transformer_stack", **values) for _ in range(60)]
        assert all(same(found.result(), alone) for found in runs)
    child = os.fork()
    if not child:
        os._exit(not same(run("transformer_stack", **values), alone))
    assert os.waitpid(child, 0)[1] == 0


def test_the_input_is_left_alone_and_no_rows_are_fine():
    values = arguments(torch.bfloat16)
    before = values["x"].clone()
    run("transformer_stack", **values)
    assert torch.equal(values["x"], before)
    empty = arguments(torch.bfloat16, lengths=[0])
    assert [tuple(out.shape) for out in run("transformer_stack", **empty)] == [(0, 48)] * 3


# --- the contract ----------------------------------------------------------------------------------------------------


def test_a_layer_that_does_not_fit_is_named():
    values = arguments(torch.float32)
    layers = values["layers"]
    values["layers"] = [layers[0], layers[1]._replace(v_bias=layers[1].v_bias[:-1]), layers[2]]
    with pytest.raises(ValueError, match=r"transformer_stack: .*v_bias of layer 2 must be .*got v_bias \(47,\)"):
        ops.transformer_stack(**values)
    for wrong, message in (({"layers": []}, "at least one layer"), ({"return_layers": (4,)}, "from 1 to 3, not")):
        with pytest.raises(ValueError, match=message):
            ops.transformer_stack(**{**arguments(torch.float32), **wrong})


def test_weights_of_two_dtypes_are_refused():
    values = arguments(torch.float32)
    values["layers"][1] = values["layers"][1]._replace(fc1_weight=values["layers"][1].fc1_weight.bfloat16())
    with pytest.raises(ValueError, match="weights of one dtype"):
        run("transformer_stack", **values)


def test_gradients_reach_the_weights_inside_the_layers():
    values = arguments(torch.float64, lengths=[4], depth=2, return_layers=(1,))
    weights = [layer.fc1_weight.requires_grad_() for layer in values["layers"]]
    last, first = ops.transformer_stack(**values)
    assert torch.autograd.grad(first.sum(), weights[1], allow_unused=True) == (None,)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(last.square().sum(), weights))
    assert ops.transformer_stack.request(values).grad
    assert not ops.transformer_stack.request({**values, "layers": arguments(torch.float64)["layers"]}).grad


# --- where the model runs it -----------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """What ran, in order: (op, backend). Two more backends: `halves` has the ops of a layer, `whole` the stack too."""
    log = []

    def logged(name, backend, forward):
        def call(*values):
            log.append((name, backend))
            return forward(*values)

        return call

    for name in ("pre_ln_attention", "gelu_ffn", "transformer_stack"):
        added = [Kernel(name, backend, logged(name, backend, OPS[name].reference), priority=5)
                 for backend in ("whole", "halves") if (name, backend) != ("transformer_stack", "halves")]  # fmt: skip
        known = [k for k in registry.kernels(name) if k.backend == REFERENCE]
        known = [Kernel(name, k.backend, logged(name, k.backend, k.forward), priority=-1) for k in known]
        monkeypatch.setitem(registry._KERNELS, name, added + known)
    monkeypatch.setattr(registry, "backends", lambda: {"whole": None, "halves": None, REFERENCE: None})
    yield log


def tiny(backend=None):
    torch.manual_seed(0)
    return ESM1(Config(3, 32, 48, 2), backend=backend).eval()


def batch():
    return batching.pack_padded(torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1]]))[0]


LAYERS = [("pre_ln_attention", "gelu_ffn")] * 3


def halves(backend):
    return [(name, backend) for layer in LAYERS for name in layer]


@torch.no_grad()
def test_the_model_runs_the_stack_where_its_backend_has_one(calls):
    for backend, expected in [
        (None, [("transformer_stack", "whole")]),
        ("whole", [("transformer_stack", "whole")]),
        ("halves", halves("halves")),
        (REFERENCE, halves(REFERENCE)),
    ]:
        calls.clear()
        tiny(backend).forward_packed(batch(), layers=(1, 3), logits=True)
        assert calls == expected


@torch.no_grad()
def test_maps_come_from_the_layers(calls):
    for wanted in ({"attentions": True}, {"layers": (2,), "attentions": True}):
        calls.clear()
        tiny().forward_packed(batch(), **wanted)
        assert calls == halves("whole")
    calls.clear()
    tiny().forward_packed(batch(), layers=(0,))
    assert not calls


def test_training_never_runs_the_stack(calls):
    model = tiny("whole")
    out = model.forward_packed(batch(), layers=(3,)).representations[3]
    assert calls == halves("whole")
    out.sum().backward()
    assert all(layer.fc1.weight.grad is not None for layer in model.layers)
    calls.clear()
    model.requires_grad_(False)
    model.layers[1].fc1.bias.requires_grad_()  # the embedding has no gradient, one layer does
    model.forward_packed(batch(), layers=(3,))
    assert calls == halves("whole")


@torch.no_grad()
def test_the_model_gives_the_same_either_way():
    model = tiny()
    for dtype in HALF_AND_FULL:
        model = model.to(dtype)
        stacked = model.forward_packed(batch(), layers=(0, 1, 2, 3), logits=True)
        one_by_one = model.forward_packed(batch(), layers=(0, 1, 2, 3), logits=True, attentions=True)
        assert stacked.representations.keys() == one_by_one.representations.keys()
        for number, stream in stacked.representations.items():
            assert torch.equal(stream, one_by_one.representations[number])
        assert torch.equal(stacked.logits, one_by_one.logits)
