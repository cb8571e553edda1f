"""What the ops' own cases do not reach in the interpreter: more tiles than one, views, other batches, a whole model."""

import copy

import numpy as np
import pytest
import torch
from triton_proof import traffic

from esm_fast.models.esm1 import ESM1, Config
from esm_fast.ops import OPS, registry, verify
from esm_fast.ops.attention_varlen import _case as attention_case
from esm_fast.ops.gelu_ffn import _case as ffn_case
from esm_fast.ops.masked_softmax import _case as softmax_case
from esm_fast.ops.pre_ln_attention import _case as layer_case
from esm_fast.ops.registry import Case
from esm_fast.ops.transformer_stack import _case as stack_case
from esm_fast.ops.transformer_stack import stack_call
from esm_fast.sequences.batching import PackedBatch, pack

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
wide_and_half = pytest.mark.parametrize("dtype", DTYPES[::2], ids=lambda dtype: str(dtype)[6:])
LONG = {
    "attention_varlen": [attention_case("tiles", [64, 65, 129], 1, 32)],
    "pre_ln_attention": [layer_case("tiles", [70, 60], 2, 72), layer_case("rotary", [65, 0, 3], 3, 24, rotary=True)],
    "gelu_ffn": [ffn_case("tiles", 130, 200, 300)],
    "masked_softmax": [softmax_case("pieces", [40, 33], 1)],
}


def kernel(op_name):
    return next(kernel for kernel in registry.kernels(op_name) if kernel.backend == "triton")


def run(op_name, arguments):
    return verify.outputs_of(kernel(op_name).forward(*verify.bound(OPS[op_name], arguments).values()))


@wide_and_half
@pytest.mark.parametrize("op_name, case", [pytest.param(o, c, id=f"{o}-{c.name}") for o in LONG for c in LONG[o]])
def test_more_than_one_tile(op_name, case, dtype, monkeypatch):
    from esm_fast.kernels.triton import masked_softmax

    monkeypatch.setattr(masked_softmax, "_LONGEST", 32)
    checks = verify.forward(OPS[op_name], kernel(op_name), case, dtype, "cpu")
    for check in checks + verify.gradients(OPS[op_name], kernel(op_name), case, dtype, "cpu"):
        assert check.ok, check


def test_the_longest_protein_bfloat16():
    op = OPS["attention_varlen"]
    for check in verify.forward(op, kernel(op.name), attention_case("longest", [1022], 1, 64), torch.bfloat16, "cpu"):
        assert check.ok, check


@wide_and_half
def test_q_and_k_come_back_and_carry_gradients(dtype):
    plain = layer_case("rotary", [5, 33], 2, 16, rotary=True)
    case = Case("return_qk", lambda *where: {**plain.build(*where), "return_qk": True})
    op = OPS["pre_ln_attention"]
    checks = verify.forward(op, kernel(op.name), case, dtype, "cpu")
    assert len(checks) == 3
    for check in checks + verify.gradients(op, kernel(op.name), case, dtype, "cpu"):
        assert check.ok, check


@wide_and_half
@pytest.mark.parametrize("op_name", ["pre_ln_attention", "gelu_ffn"])
def test_rows_keep_their_bits_in_any_batch(op_name, dtype):
    """A sequence alone, and the same one in the middle of others."""
    lengths, (start, end) = [40, 65, 100], (40, 105)
    if op_name == "gelu_ffn":
        arguments = ffn_case("packed", sum(lengths), 48, 160).build(dtype, "cpu", 0)
        alone = {**arguments, "x": arguments["x"][start:end]}
    else:
        arguments = layer_case("packed", lengths, 2, 24).build(dtype, "cpu", 0)
        alone = {**arguments, "x": arguments["x"][start:end], "max_seqlen": end - start}
        alone["cu_seqlens"] = torch.tensor([0, end - start], dtype=torch.int32)
    (packed,), (single,) = run(op_name, arguments), run(op_name, alone)
    assert torch.equal(packed[start:end], single)


@wide_and_half
def test_views_and_expanded_gradients_are_taken(dtype):
    """q, k and v as slices of one tensor, and a gradient of stride 0."""
    arguments = attention_case("ragged", [7, 20], 2, 16).build(dtype, "cpu", 0)
    together = torch.stack([arguments[name] for name in "qkv"], dim=2)
    views = dict(zip("qkv", together.unbind(2), strict=True))
    assert not views["q"].is_contiguous()
    found = []
    for q, k, v in ([arguments[n] for n in "qkv"], views.values()):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = OPS["attention_varlen"](**{**arguments, **dict(zip("qkv", leaves, strict=True))}, backend="triton")
        found.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for plain, viewed in zip(*found, strict=True):
        assert torch.equal(plain, viewed)


LENGTHS = np.array([20, 1, 40])


def whole_model(dtype) -> ESM1:
    """Two layers, 128 wide, with a fitted contact head."""
    torch.manual_seed(0)
    model = ESM1(Config(2, 128, 512, 2))
    torch.nn.init.normal_(model.contact_head.regression.weight)
    return model.to(dtype)


def packed(which) -> PackedBatch:
    ids = np.random.default_rng(0).integers(4, 24, LENGTHS.sum(), dtype=np.uint8)
    return pack(ids, LENGTHS.cumsum() - LENGTHS, LENGTHS, np.array(which))


def everything(model, batch, backend: str) -> dict[str, torch.Tensor]:
    model.backend = backend
    out = model.forward_packed(batch, layers=(0, 1, 2), logits=True, contacts=True)
    maps = torch.cat([contacts.flatten() for contacts in out.contacts])
    return {"logits": out.logits, "contacts": maps} | {f"layer {k}": x for k, x in out.representations.items()}


@every_dtype
def test_a_whole_model_end_to_end(dtype):
    """Logits, representations, contacts, and the gradient of every parameter from all of them."""
    batch, half = packed(range(3)), whole_model(dtype)

    def through(model, backend):
        found = everything(model, batch, backend)
        generator = torch.Generator().manual_seed(0)
        terms = [(x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).mean()
                 for x in found.values()]  # fmt: skip
        return [x.detach() for x in found.values()], torch.autograd.grad(sum(terms), list(model.parameters())), found

    (got, grads, found), (plain, plain_grads, _) = through(half, "triton"), through(half, "reference")
    truth, true_grads, _ = through(copy.deepcopy(half).double(), "reference")
    largest = max(float(grad.abs().max()) for grad in true_grads)
    checks = verify.compare(found, got, plain, truth, dtype, 2.0)
    names = [name for name, _ in half.named_parameters()]
    checks += verify.compare(names, grads, plain_grads, true_grads, dtype, 3.0, largest)
    assert [check for check in checks if not check.ok] == []


def test_a_protein_keeps_its_bits_in_any_batch_bfloat16():
    model = whole_model(torch.bfloat16)
    with torch.inference_mode():
        together = everything(model, packed(range(3)), "triton")
        alone = [everything(model, packed([i]), "triton") for i in range(3)]
    for name, x in together.items():
        assert torch.equal(x, torch.cat([one[name] for one in alone])), name


def test_all_layers_together_have_the_bits_of_their_halves_bfloat16():
    """Streams that are kept and pooled on the way included; buffers are used again by every layer."""
    from esm_fast.kernels.triton import transformer_stack as triton_stack

    pools = [(1, "pool"), (2, "pool_max")]
    case = stack_case("rotary", [5, 0, 33], 2, 16, 80, 3, (1, 2), True, pools)
    arguments = case.build(torch.bfloat16, "cpu", 0)
    with torch.inference_mode():
        call = stack_call("triton", **arguments)
        assert call.args[0] is triton_stack.stack
        x, first, second, *pooled = call()
        names = ("x", "cu_seqlens", "max_seqlen", "layers", "heads", "rotary")
        streams = list(triton_stack._by_halves(*(arguments[name] for name in names)))
        ends, kept = arguments["cu_seqlens"], arguments["pools"]
        wanted = [OPS[p.op](s, ends, p.rows, backend="triton") for s, p in zip(streams, kept, strict=False)]
    for got, right in zip([first, second, x, *pooled], [*streams, *wanted], strict=True):
        assert torch.equal(got, right)


def test_a_norm_moves_what_it_must_bfloat16():
    from esm_fast.kernels.triton.layer_norm import layer_norm, layer_norm_grads

    x, grad = torch.randn(2, 512, 128)
    dout, gain, bias = (torch.randn(*shape).bfloat16() for shape in (x.shape, [128], [128]))
    forward = traffic.measure(lambda: layer_norm(x, gain, bias, 1e-5, torch.bfloat16))
    backward = traffic.measure(lambda: layer_norm_grads(x, gain, dout, grad, 1e-5))
    assert forward.distinct <= 1.15 * x.numel() * (4 + 2)
    assert backward.distinct <= 1.15 * x.numel() * (4 + 2 + 4 + 4)


def test_products_request_what_their_tiles_must_bfloat16():
    """A tile needs its rows and its columns, whole; what follows a product adds one pass."""
    from esm_fast.kernels.triton import linear, pre_ln_attention
    from esm_fast.kernels.triton.configs import linear_config

    m, n, k = 200, 192, 192
    tiles = linear_config("linear", 80, torch.bfloat16).tiles
    rows, columns = -(-m // tiles["BLOCK_M"]), -(-n // tiles["BLOCK_N"])
    operands = 2 * rows * columns * (tiles["BLOCK_M"] + tiles["BLOCK_N"]) * k
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ([m, k], [n, k], [n]))
    stream = torch.randn(m, n)
    gelu = traffic.measure(lambda: linear.linear_gelu(x, weight, bias))
    residual = traffic.measure(lambda: linear.linear_residual(x, weight, bias, stream))
    qkv = traffic.measure(lambda: pre_ln_attention._project(x, [weight] * 3, [bias] * 3))
    assert gelu.requested <= 1.05 * (operands + 2 * m * n)
    assert residual.requested <= 1.05 * (operands + 8 * m * n)
    assert qkv.requested <= 1.05 * 3 * (operands + 2 * m * n)


def test_tf32_follows_torch_float32():
    from esm_fast.kernels.triton import common

    products = torch.backends.cuda.matmul
    before = products.allow_tf32
    try:
        for allowed, expected in ((False, "ieee"), (True, "tf32")):
            products.allow_tf32 = allowed
            assert common.precision() == expected
    finally:
        products.allow_tf32 = before
