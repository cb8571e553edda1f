"""Every op on every backend that can run here, on every case of its contract, against fp64."""

import itertools

import pytest
import torch
from runnable import require_runnable
from torch.utils import _pytree as pytree

from esm_fast.ops import OPS, BackendError, registry, select, verify
from esm_fast.ops.registry import REFERENCE, Kernel, Request

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def runs():
    """(op, kernel, case, dtype, device) for the whole registry."""
    for op, device in itertools.product(OPS.values(), DEVICES):
        for kernel, case, dtype in itertools.product(registry.kernels(op.name), op.cases(), DTYPES):
            name = f"{op.name}-{kernel.backend}-{case.name}-{str(dtype)[6:]}-{device}"
            yield pytest.param(op, kernel, case, dtype, device, id=name)


@pytest.mark.parametrize("op, kernel, case, dtype, device", list(runs()))
def test_forward(op, kernel, case, dtype, device):
    require_runnable(op, kernel, case, dtype, device)
    for check in verify.forward(op, kernel, case, dtype, device):
        assert check.ok, check


@pytest.mark.parametrize("op, kernel, case, dtype, device", [p for p in runs() if p.values[3] == torch.float32])
def test_gradients(op, kernel, case, dtype, device):
    require_runnable(op, kernel, case, dtype, device)
    for check in verify.gradients(op, kernel, case, dtype, device):
        assert check.ok, check


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_reference_gradient_is_the_functions(op):
    """Finite differences in fp64, on the smallest case that has rows."""
    one_row = dict.fromkeys(("masked_lm_head", "gelu_ffn", "pack_rows", "unpack_rows"), "one_row")
    build = {**one_row, "masked_softmax": "one"}.get(op.name, "tiny")
    case = next(case for case in op.cases() if case.name == build)
    arguments = verify.bound(op, case.build(torch.float64, "cpu", 0))
    leaves, structure = pytree.tree_flatten(arguments)
    where = [i for i, leaf in enumerate(leaves) if verify.differentiable(leaf)]

    def function(*values):
        filled = list(leaves)
        for i, value in zip(where, values, strict=True):
            filled[i] = value
        return tuple(verify.outputs_of(op.reference(**pytree.tree_unflatten(filled, structure))))

    assert torch.autograd.gradcheck(function, tuple(leaves[i].requires_grad_() for i in where), fast_mode=True)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_cost_is_stated(op):
    for case in op.cases():
        cost = op.cost(**verify.bound(op, case.build(torch.float32, "cpu", 0)))
        assert cost.flops >= 0 and cost.bytes >= 0
    assert cost.bytes > 0


# --- attention against the formula, since the reference leans on torch's own kernel ---------------------------------


def test_attention_is_the_textbook_formula():
    op = OPS["attention_varlen"]
    arguments = op.cases()[3].build(torch.float64, "cpu", 0)
    q, k, v = (arguments[name].transpose(0, 1) for name in "qkv")
    out = op(**arguments).transpose(0, 1)
    for start, end in itertools.pairwise(arguments["cu_seqlens"].tolist()):
        scores = q[:, start:end] @ k[:, start:end].transpose(1, 2) * arguments["scale"]
        torch.testing.assert_close(out[:, start:end], scores.softmax(-1) @ v[:, start:end])


def test_gelu_is_the_exact_one():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    from esm_fast.ops.common import gelu

    torch.testing.assert_close(gelu(x), x * 0.5 * (1 + torch.erf(x / 2**0.5)), rtol=1e-14, atol=1e-15)


# --- contracts and selection -----------------------------------------------------------------------------------------


def test_a_wrong_shape_is_named_with_all_shapes():
    arguments = OPS["gelu_ffn"].cases()[0].build(torch.float32, "cpu", 0)
    arguments["fc2_weight"] = arguments["fc2_weight"].T
    with pytest.raises(ValueError, match=r"gelu_ffn: fc2_weight must be .*got fc2_weight \(256, 64\).*x \(1, 64\)"):
        OPS["gelu_ffn"](**arguments)


def test_maps_of_another_size_are_refused():
    arguments = OPS["contact_map"].cases()[0].build(torch.float32, "cpu", 0)
    with pytest.raises(ValueError, match="contact_map: size must be 1, is 2"):
        OPS["contact_map"](**arguments | {"size": 2})


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if "cu_seqlens" in op.signature.parameters], ids=lambda op: op.name
)
@pytest.mark.parametrize("wrong", [torch.tensor([0, 1]), torch.zeros(1, 2, dtype=torch.int32), torch.tensor([]).int()])
def test_offsets_that_are_none_are_refused(op, wrong):
    arguments = op.cases()[0].build(torch.float32, "cpu", 0) | {"cu_seqlens": wrong}
    with pytest.raises(ValueError, match=rf"{op.name}: cu_seqlens must be int32, \(sequences \+ 1,\); got cu_seqlens"):
        op(**arguments)


def cpu_request(dtype=torch.float32):
    return Request("cpu", None, dtype, 64, False)


def test_a_backend_asked_for_by_name_raises_its_reasons():
    with pytest.raises(BackendError, match="pre_ln_attention cannot run on backend 'xformers' here: .*CUDA"):
        select("pre_ln_attention", cpu_request(), "xformers")


@pytest.mark.parametrize("module, is_a_reason", [("somelib", True), (None, True), ("esm_fast.kernels.cpu", False)])
def test_only_a_missing_library_is_a_reason(module, is_a_reason, monkeypatch):
    def fail(name):
        raise ImportError("it is not there", name=module)

    monkeypatch.setattr(registry.importlib, "import_module", fail)
    backends = registry.backends.__wrapped__
    if is_a_reason:
        assert backends()["cpu"] == "it is not there"
    else:
        with pytest.raises(ImportError, match="not there"):
            backends()


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="no backend 'tpu'; choose one of .*reference"):
        select("gelu_ffn", cpu_request(), "tpu")


def test_unnamed_selection_ends_at_the_reference():
    for name in OPS:
        assert select(name, cpu_request(torch.float64)).backend == REFERENCE
        assert registry.explain(name, cpu_request())[-1] == (REFERENCE, [])


def test_a_kernel_that_yields_runs_only_by_name(monkeypatch):
    slow = Kernel("gelu_ffn", "slow", lambda *_: None, priority=50, yields=lambda request: ["slower here"])
    monkeypatch.setitem(registry._KERNELS, "gelu_ffn", [slow, *registry.kernels("gelu_ffn")])
    monkeypatch.setattr(registry, "backends", lambda: {"slow": None, REFERENCE: None})
    assert registry.select("gelu_ffn", cpu_request()).backend != "slow"
    assert registry.select("gelu_ffn", cpu_request(), "slow") is slow
    assert registry.explain("gelu_ffn", cpu_request())[0] == ("slow", ["slower here"])


@pytest.fixture
def toy_backend(monkeypatch):
    """A second backend for gelu_ffn: right or wrong on demand, without a backward of its own."""
    op = OPS["gelu_ffn"]
    state = {"factor": 1.0, "calls": 0}

    def forward(*values):
        state["calls"] += 1
        return op.reference(*values) * state["factor"]

    kernel = Kernel("gelu_ffn", "toy", forward, priority=5)
    monkeypatch.setitem(registry._KERNELS, "gelu_ffn", [kernel, *registry._KERNELS["gelu_ffn"]])
    yield kernel, state


def test_the_check_catches_a_wrong_kernel(toy_backend):
    kernel, state = toy_backend
    case = OPS["gelu_ffn"].cases()[1]
    assert all(c.ok for c in verify.forward(OPS["gelu_ffn"], kernel, case, torch.float32, "cpu"))
    state["factor"] = 1 + 1e-4
    assert not all(c.ok for c in verify.forward(OPS["gelu_ffn"], kernel, case, torch.float32, "cpu"))


def test_a_kernel_without_backward_trains_by_recomputation(toy_backend):
    _, state = toy_backend
    op = OPS["gelu_ffn"]
    arguments = {n: v.requires_grad_() for n, v in op.cases()[1].build(torch.float64, "cpu", 0).items()}
    arguments["fc1_bias"].requires_grad_(False)
    wanted = [v for v in arguments.values() if v.requires_grad]
    ours = torch.autograd.grad(op(**arguments).square().sum(), wanted)
    assert state["calls"] == 1
    reference = torch.autograd.grad(op.reference(**arguments).square().sum(), wanted)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b)
