"""8-bit weights: exact integers at every level, the definition's numbers, and nothing of it by surprise."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map_only

import esm_fast
from esm_fast import _C, weights
from esm_fast.cli import main
from esm_fast.formats import formats, smoothing
from esm_fast.formats.int8 import Int8Weight
from esm_fast.formats.model import prepack_model
from esm_fast.formats.smoothing import Smoothing
from esm_fast.formats.weight import MATRICES, PrepackedWeight
from esm_fast.inference.embed import embed
from esm_fast.ops import OPS, registry, verify
from esm_fast.ops.gelu_ffn import _case as ffn_case
from esm_fast.ops.pre_ln_attention import _case as attention_case
from esm_fast.ops.quantize import GROUP, int8_linear, quantize
from esm_fast.sequences.batching import pack_padded

SHAPES = [(1, 1, 1), (5, 33, 63), (13, 70, 130), (30, 96, 256), (40, 64, 257), (25, 40, 1280)]  # rows, outputs, inputs
_MATRIX = (2, torch.bfloat16)  # the residual stream is fp32
SAMPLE = 1497741  # of the proteins that smoothing sees
TOKENS = torch.tensor([[0, 20, 15, 32, 11, 7, 2], [0, 5, 5, 5, 2, 1, 1]])


@pytest.fixture(params=_C.isas())
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    result = torch.empty(len(x), weight.shape[0])
    _C.int8_linear(x=x, weights=weight.weights, result=result)
    return result


def with_8_bits(arguments):
    """A case's arguments with its matrices quantised."""
    return tree_map_only(torch.Tensor, lambda t: Int8Weight.pack(t) if (t.ndim, t.dtype) == _MATRIX else t, arguments)


def kernel(op_name):
    return next(k for k in registry.kernels(op_name) if k.backend == "cpu")


def run(op_name, **arguments):
    return verify.outputs_of(kernel(op_name).forward(*verify.bound(OPS[op_name], arguments).values()))


def check(op_name, case, seed=0, **more):
    case = case._replace(build=lambda *where, build=case.build: with_8_bits(build(*where) | more))
    for result in verify.forward(OPS[op_name], kernel(op_name), case, torch.bfloat16, "cpu", seed):
        assert result.ok, (case.name, result)


# --- the arithmetic --------------------------------------------------------------------------------------------------


def test_rows_are_quantised_to_the_nearest_number_of_their_group():
    rows = random(3, 600)
    rows[1, 300:500] = 0
    rows[2, GROUP : 2 * GROUP] = 0
    rows[0, 10] = 1e-35
    numbers, scales = quantize(rows)
    assert numbers.shape == (3, 600) and scales.shape == (3, 3)
    for row, group in itertools.product(range(3), range(3)):
        inside = slice(group * GROUP, (group + 1) * GROUP)
        largest = rows[row, inside].abs().max()
        assert scales[row, group] == largest / 127
        assert numbers[row, inside].abs().max() == (127 if largest else 0)
        error = (numbers[row, inside] * scales[row, group] - rows[row, inside]).abs().max()
        assert error <= largest / 254 * 1.00001
    for broken in (float("nan"), float("inf")):
        rows[0, 3] = broken
        assert not quantize(rows).scales[0, 0].isfinite() and quantize(rows).scales[0, 1:].isfinite().all()


@pytest.mark.parametrize("rows, outputs, inputs", SHAPES)
def test_integer_sums_are_exact(isa, rows, outputs, inputs):
    """With 127 in every group all scales are 1, and the sums are integers that fp32 holds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (rows, inputs), generator=generator)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator)
    x[0], weight[0] = 127, -127  # the largest sum there is
    x[:, ::GROUP], weight[:, ::GROUP] = 127, -127
    got = linear(x.float(), Int8Weight.pack(weight.float()))
    if inputs <= GROUP:
        assert torch.equal(got.long(), x @ weight.T)
    assert torch.allclose(got.double(), (x @ weight.T).double(), rtol=1e-6, atol=0)
    assert torch.equal(int8_linear(x.double(), Int8Weight.pack(weight.float()).quantized()).long(), x @ weight.T)


@pytest.mark.parametrize("rows, outputs, inputs", SHAPES)
def test_a_linear_layer_is_the_definition(isa, rows, outputs, inputs):
    x, weight = random(rows, inputs), random(outputs, inputs, seed=1)
    x[0, 0], weight[0, -1] = 50, 30
    weight = Int8Weight.pack(weight)
    got, (numbers, scales), theirs = linear(x, weight), quantize(x), weight.quantized()
    wide = (
        quantize(x)._replace(scales=scales.double()).values()
        @ theirs._replace(scales=theirs.scales.double()).values().T
    )
    assert (got - wide).abs().max() <= 2e-6 * wide.abs().max()
    defined = int8_linear(x, theirs)
    assert (got - defined).abs().max() <= 2e-6 * wide.abs().max()
    assert numbers.dtype == torch.int8


def test_the_groups_are_the_kernels():
    assert GROUP == _C.GROUP


def test_what_is_packed_comes_back():
    for outputs, inputs in [(1, 1), (33, 63), (70, 600)]:
        matrix = random(outputs, inputs)
        weight, expected = Int8Weight.pack(matrix), quantize(matrix)
        assert all(map(torch.equal, weight.quantized(), expected))
        assert torch.equal(weight.unpack(), expected.values().bfloat16())
        assert weight.weights.nbytes == _C.prepacked_size("int8", outputs, inputs)
        view = _C.view_weights(weight.weights, "int8", outputs, inputs)
        assert torch.equal(Int8Weight(view).unpack(), weight.unpack())
    assert _C.prepacked_size("int8", 1280, 5120) < 1.04 * 1280 * 5120


# --- the ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, case",
    [
        pytest.param(name, case, id=f"{name}-{case.name}")
        for name in ("gelu_ffn", "pre_ln_attention", "transformer_stack")
        for case in OPS[name].cases()
    ],
)
def test_every_case_at_every_level(isa, name, case):
    check(name, case)


def test_q_and_k_come_back_as_the_attention_saw_them(isa):
    check("pre_ln_attention", attention_case("plain", [5, 0, 33], 3, 20), return_qk=True)
    check("pre_ln_attention", attention_case("rotary", [5, 33], 2, 16, rotary=True), return_qk=True)


relaxed = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@relaxed
@given(st.integers(1, 70), st.integers(2, 300), st.integers(1, 300), st.integers(0, 2**31))
def test_any_shape_of_ffn(isa, rows, width, hidden, seed):
    check("gelu_ffn", ffn_case("random", rows, width, hidden), seed)


@relaxed
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(any),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_any_shape_of_attention(isa, lengths, heads, half_dim, seed):
    check("pre_ln_attention", attention_case("random", lengths, heads, 2 * half_dim), seed)


def test_nan_infinity_and_zeros_stay_in_their_own_rows(isa):
    arguments = with_8_bits(ffn_case("poison", 30, 300, 600).build(torch.bfloat16, "cpu", 0))
    clean = run("gelu_ffn", **arguments)[0]
    arguments["x"] = arguments["x"].clone()
    arguments["x"][13, 5], arguments["x"][14], arguments["x"][20] = float("nan"), float("inf"), 0
    out = run("gelu_ffn", **arguments)[0]
    assert out[13].isnan().all() and not out[14].isfinite().any() and out[20].isfinite().all()
    others = [row for row in range(30) if row not in (13, 14, 20)]
    assert torch.equal(out[others], clean[others])

    arguments = with_8_bits(attention_case("poison", [7, 33, 20], 2, 20).build(torch.bfloat16, "cpu", 0))
    clean = run("pre_ln_attention", **arguments)[0]
    arguments["x"] = arguments["x"].clone()
    arguments["x"][10, 5] = float("nan")
    out = run("pre_ln_attention", **arguments)[0]
    assert out[7:40].isnan().all()
    assert torch.equal(out[:7], clean[:7]) and torch.equal(out[40:], clean[40:])


def test_a_protein_has_the_same_bits_in_any_batch(isa):
    lengths = [33, 1, 70, 20]
    arguments = with_8_bits(attention_case("batch", lengths, 4, 24).build(torch.bfloat16, "cpu", 0))
    ffn = with_8_bits(ffn_case("batch", sum(lengths), 96, 300).build(torch.bfloat16, "cpu", 1))

    def both(rows, ends):
        ends = torch.tensor(ends, dtype=torch.int32)
        x = run("pre_ln_attention", **{**arguments, "x": arguments["x"][rows], "cu_seqlens": ends, "max_seqlen": 70})[0]
        return run("gelu_ffn", **{**ffn, "x": x})[0]

    ends = [0, *itertools.accumulate(lengths)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = both(slice(None), ends)
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(both(slice(None), ends), together)
            for start, end in itertools.pairwise(ends):
                assert torch.equal(both(slice(start, end), [0, end - start]), together[start:end])
    finally:
        torch.set_num_threads(before)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    exact, _ = esm_fast.load("random:esm1b_t6_demo")
    with torch.no_grad():
        exact.contact_head.regression.weight.fill_(0.05)
        for layer in exact.layers:  # as in trained models, a few channels stand out
            layer.self_attn_layer_norm.weight[3] = layer.final_layer_norm.weight[7] = 20.0
    rounded = copy.deepcopy(exact).bfloat16()
    prepack_model(rounded, formats()["int8"])
    return exact, rounded


def test_a_model_comes_close_to_fp32_with_all_its_outputs(models):
    exact, rounded = models
    assert all(
        isinstance(layer.get_submodule(name).weight, Int8Weight) for layer in rounded.layers for name in MATRICES
    )
    asked = dict(layers=(0, 3, 6), logits=True, attentions=True, contacts=True)
    with torch.inference_mode():
        want, got = (model.forward_packed(pack_padded(TOKENS)[0], **asked) for model in (exact, rounded))
    for ours, theirs in [
        *((got.representations[layer], want.representations[layer]) for layer in (0, 3, 6)),
        (got.logits, want.logits),
        *zip(got.contacts, want.contacts, strict=True),
        *zip(got.attentions, want.attentions, strict=True),
    ]:
        similar = torch.nn.functional.cosine_similarity(ours.flatten().double(), theirs.flatten().double(), dim=0)
        assert similar > 0.995, similar


def test_all_ways_through_a_model_agree(models):
    """The definition in torch, and the layers one by one, which is how contacts are made."""
    _, rounded = models
    batch = pack_padded(TOKENS)[0]
    with torch.inference_mode():
        stack = rounded.forward_packed(batch, layers=(6,)).representations[6]
        rounded.contact_head.require_fitted()
        by_layers = rounded.forward_packed(batch, layers=(6,), contacts=True).representations[6]
        rounded.backend = "reference"
        defined = rounded.forward_packed(batch, layers=(6,)).representations[6]
        rounded.backend = None
    assert torch.equal(stack, by_layers)
    assert torch.nn.functional.cosine_similarity(stack, defined).min() > 0.998


def test_load_and_embed(models):
    model, _ = esm_fast.load("random:esm1b_t6_demo", dtype="int8")
    plain, _ = esm_fast.load("random:esm1b_t6_demo")
    proteins = ["MKTAYIAKQRQISFVKSHFSRQ", "MKKLLAGW" * 20]
    for (_, ours), (_, theirs) in zip(embed(model, proteins), embed(plain, proteins), strict=True):
        assert torch.nn.functional.cosine_similarity(*(torch.tensor(a[-1]) for a in (ours, theirs)), dim=0) > 0.999
    assert model.dtype == torch.bfloat16 and not any(parameter.requires_grad for parameter in model.parameters())


def _with_outliers(seed=0):
    """Of layers as trained ones are: large gains, and channels that are far from 0 throughout."""
    torch.manual_seed(seed)
    model, _ = esm_fast.load("random:esm1b_t6_demo")
    with torch.no_grad():
        for layer in model.layers:
            for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
                norm.weight[:6] = torch.tensor([30.0, -8.0, 0.01, 1e-30, 0.0, 3.0])
                norm.bias[[7, 40, 100]] = torch.tensor([60.0, -25.0, 12.0])
            layer.fc1.weight[:, 50] = 0
    return model


def test_smoothing_changes_nothing_but_what_is_quantised():
    """Norms, biases and factors together are the same function; the factors are powers of two."""
    model = _with_outliers().double().requires_grad_(False)
    smoothed = copy.deepcopy(model)
    smooth = Smoothing(smoothed)
    for layer, before in zip(smoothed.layers, model.layers, strict=True):
        for name, factor in smooth(layer).items():
            assert torch.equal(torch.exp2(torch.log2(factor).round()), factor)
            layer.get_submodule(name).weight.mul_(factor)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            ours, theirs = layer.get_submodule(norm), before.get_submodule(norm)
            assert ours.bias[7].abs() < 0.2 * theirs.bias[7].abs() and ours.weight[0].abs() < theirs.weight[0].abs()
    batch = pack_padded(TOKENS)[0]
    got, want = (m.forward_packed(batch, layers=(6,)).representations[6] for m in (smoothed, model))
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()


def test_smoothing_is_the_same_every_time():
    tokens = smoothing.sample().tokens
    assert tokens.shape == (520,) and int((tokens * torch.arange(520)).sum()) == SAMPLE
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = _with_outliers().bfloat16()
        prepack_model(model, formats()["int8"])
        made.append({k: v.unpack() if isinstance(v, PrepackedWeight) else v for k, v in model.state_dict().items()})
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_channels_far_from_zero_cost_no_digits():
    exact, rounded = _with_outliers(), _with_outliers().bfloat16()
    plain = copy.deepcopy(rounded)
    prepack_model(rounded, formats()["int8"])
    prepack_model(plain, replace(formats()["int8"], smoothing=lambda model, original: lambda layer: {}))
    batch = pack_padded(TOKENS)[0]
    with torch.inference_mode():
        want, got, worse = (m.forward_packed(batch, layers=(6,)).representations[6] for m in (exact, rounded, plain))
    assert (got - want).norm() < 0.5 * (worse - want).norm()


def test_a_file_of_8_bits(tmp_path):
    """Converted, mapped, and the same model; other types are refused by what it holds."""
    plain, packed = tmp_path / "plain.safetensors", tmp_path / "packed.safetensors"
    model, _ = esm_fast.load("random:esm1b_t6_demo")
    weights.save(model, plain)
    assert main(["convert", str(plain), str(tmp_path / "never"), "--dtype", "int8"]) == 1
    assert main(["convert", str(plain), str(packed), "--dtype", "int8", "--pack"]) == 0
    assert packed.stat().st_size < 0.45 * plain.stat().st_size
    (_, ours), (_, theirs) = (
        next(embed(esm_fast.load(*given, **more)[0], ["MKTAYIAKQR"]))
        for given, more in [((packed,), {}), ((plain,), {"dtype": "int8"})]
    )
    assert (ours[-1] == theirs[-1]).all()
    with pytest.raises(ValueError, match="holds int8 weights, prepacked"):
        esm_fast.load(packed, dtype="bfloat16")
    unpacked, _ = esm_fast.load(packed, packed=False)
    assert not isinstance(unpacked.layers[0].fc1.weight, PrepackedWeight)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_where_8_bits_do_not_run_is_said():
    with pytest.raises(ValueError, match="always prepacked"):
        esm_fast.load("random:esm1b_t6_demo", dtype="int8", packed=False)
    with pytest.raises(ValueError, match="CPUs only, not on cuda"):
        esm_fast.load("random:esm1b_t6_demo", dtype="int8", device="cuda")
    before = _C.isa()
    _C.set_isa("base")
    try:
        with pytest.raises(ValueError, match="level here, base, has no instructions for 8 bits"):
            esm_fast.load("random:esm1b_t6_demo", dtype="int8")
        model, _ = esm_fast.load("random:esm1b_t6_demo", dtype="int8", backend="cpu")
        assert next(embed(model, ["MKTAY"]))[1][-1].shape == (192,)
    finally:
        _C.set_isa(before)


def test_gradients_are_refused():
    arguments = with_8_bits(ffn_case("training", 3, 32, 64).build(torch.bfloat16, "cpu", 0))
    arguments["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="8-bit weights have no gradients"):
        OPS["gelu_ffn"](**arguments, backend="reference")


def test_weights_of_two_kinds_are_refused():
    arguments = ffn_case("mixed", 3, 32, 64).build(torch.bfloat16, "cpu", 0)
    arguments["fc2_weight"] = Int8Weight.pack(arguments["fc2_weight"])
    with pytest.raises(ValueError, match="cannot be mixed"):
        run("gelu_ffn", **arguments)
    attention = attention_case("mixed", [3], 2, 16).build(torch.bfloat16, "cpu", 0)
    for name in ("k_weight", "out_weight"):
        with pytest.raises(ValueError, match="cannot be mixed"):
            run("pre_ln_attention", **{**attention, name: Int8Weight.pack(attention[name])})
    head = OPS["masked_lm_head"].cases()[0].build(torch.bfloat16, "cpu", 0)
    head |= {name: Int8Weight.pack(head[name]) for name in ("dense_weight", "weight") if name in head}
    with pytest.raises(ValueError, match="cannot be mixed|no kernel for int8 weights"):
        run("masked_lm_head", **head)
    matrix = random(3, 4)
    plain = PrepackedWeight.pack(matrix)
    for wrong in (
        lambda: _C.int8_linear(x=random(1, 4), weights=plain.weights, result=random(1, 3)),
        lambda: plain.weights.unpack([matrix.to(torch.int8), random(3, 1)]),
        lambda: Int8Weight.pack(matrix).weights.unpack([matrix]),
        lambda: _C.prepack([matrix], "int8"),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_another_dtype_changes_what_is_around_only():
    weight = Int8Weight.pack(random(40, 300))
    wide = weight.double()
    assert isinstance(wide, Int8Weight) and wide.dtype == torch.float64 and wide.weights is weight.weights
    assert torch.equal(wide.unpack().bfloat16(), weight.unpack())
    assert isinstance(torch.nn.Parameter(weight, requires_grad=False).detach(), Int8Weight)
    assert torch.equal(weight + 0, weight.unpack())
