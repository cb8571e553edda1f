"""What the ops' own cases do not reach in the interpreter: more tiles than one, views, other batches, a whole model."""

import copy

import numpy as np
import pytest
import torch

from esm_fast.models.esm1 import ESM1, Config
from esm_fast.ops import OPS, registry, verify
from esm_fast.ops.attention_varlen import _case as attention_case
from esm_fast.ops.gelu_ffn import _case as ffn_case
from esm_fast.ops.masked_softmax import _case as softmax_case
from esm_fast.ops.pre_ln_attention import _case as layer_case
from esm_fast.ops.registry import Case
from esm_fast.packing import pack

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
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


@every_dtype
@pytest.mark.parametrize("op_name, case", [pytest.param(o, c, id=f"{o}-{c.name}") for o in LONG for c in LONG[o]])
def test_more_than_one_tile(op_name, case, dtype, monkeypatch):
    from esm_fast.kernels.triton import masked_softmax

    monkeypatch.setattr(masked_softmax, "_TILE", 32)
    checks = verify.forward(OPS[op_name], kernel(op_name), case, dtype, "cpu")
    for check in checks + verify.gradients(OPS[op_name], kernel(op_name), case, dtype, "cpu"):
        assert check.ok, check


def test_the_longest_protein_bfloat16():
    op = OPS["attention_varlen"]
    for check in verify.forward(op, kernel(op.name), attention_case("longest", [1022], 1, 64), torch.bfloat16, "cpu"):
        assert check.ok, check


@every_dtype
def test_q_and_k_come_back_and_carry_gradients(dtype):
    plain = layer_case("rotary", [5, 33], 2, 16, rotary=True)
    case = Case("return_qk", lambda *where: {**plain.build(*where), "return_qk": True})
    op = OPS["pre_ln_attention"]
    checks = verify.forward(op, kernel(op.name), case, dtype, "cpu")
    assert len(checks) == 3
    for check in checks + verify.gradients(op, kernel(op.name), case, dtype, "cpu"):
        assert check.ok, check


@every_dtype
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


@every_dtype
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


@every_dtype
def test_a_whole_model_trains(dtype):
    """Logits, and the loss's gradient for every parameter, of two layers 128 wide."""
    torch.manual_seed(0)
    model = ESM1(Config(2, 128, 512, 2))
    ids, lengths = np.random.default_rng(0).integers(4, 24, 104, dtype=np.uint8), np.array([33, 1, 70])
    batch = pack(ids, lengths.cumsum() - lengths, lengths, np.arange(3))

    def through(model, backend):
        model.backend = backend
        logits = model.forward_packed(batch, logits=True).logits
        loss = torch.nn.functional.cross_entropy(logits.double(), batch.tokens.long())
        return [logits.detach()], torch.autograd.grad(loss, [p for n, p in named(model)])

    def named(model):
        return [(n, p) for n, p in model.named_parameters() if not n.startswith("contact_head")]

    half = copy.deepcopy(model).to(dtype)
    got, plain = through(half, "triton"), through(half, "reference")
    truth = through(copy.deepcopy(half).double(), "reference")
    largest = max(float(g.abs().max()) for g in truth[1])
    checks = verify.compare(["logits"], got[0], plain[0], truth[0], dtype, 2.0)
    checks += verify.compare([n for n, _ in named(half)], got[1], plain[1], truth[1], dtype, 3.0, largest)
    for check in checks:
        assert check.ok, check


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
