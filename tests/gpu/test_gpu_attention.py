"""The attention of libraries, `cutlass` and `xformers`, without a GPU: on a stand-in for torch's operators, from the
ops' own cases; and which backend is chosen on which GPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cutlass_standin import admitted, installed
from esm_fast.kernels import cutlass, flash
from fakes import trained_like

from esm_fast.cli import main
from esm_fast.models.esm1 import ESM1, Config
from esm_fast.ops import OPS, BackendError, registry, select, verify
from esm_fast.ops.registry import REFERENCE, Request
from esm_fast.sequences.batching import pack_padded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["cutlass", "flash", "xformers"]
TOKENS = torch.tensor([[0, 20, 15, 32, 11, 7, 2], [0, 5, 5, 5, 2, 1, 1]])
A100 = Request("cuda", (8, 0), torch.bfloat16, 64, False)


@pytest.fixture
def log(request, monkeypatch):
    """The backend, named by the test's parameter, on CPU tensors; which of torch's operators were called."""
    backend = request.getfixturevalue("backend")
    if backend == "xformers":
        take_the_cpu_for_an_a100(monkeypatch)
    with installed([]) as log, admitted(backend):
        yield log


def take_the_cpu_for_an_a100(monkeypatch):
    """What the real xformers asks of the machine; of what it chooses from, CUTLASS alone takes CPU tensors then."""
    fmha = pytest.importorskip("xformers.ops.fmha", reason="xformers is not installed")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    for operator in (fmha.cutlass.FwOp, fmha.cutlass.BwOp):
        monkeypatch.setattr(operator, "SUPPORTED_DEVICES", {"cuda", "cpu"})


def kernel_of(op, backend):
    return next(kernel for kernel in registry.kernels(op.name) if kernel.backend == backend)


def runs():
    for backend in BACKENDS:
        for name in ("attention_varlen", "pre_ln_attention"):
            for case in OPS[name].cases():
                for dtype in DTYPES:
                    # xformers has bf16 on GPUs alone, FlashAttention-2 has half types alone.
                    if (backend, dtype) not in (("xformers", torch.bfloat16), ("flash", torch.float32)):
                        text = f"{name}-{backend}-{case.name}-{str(dtype)[6:]}"
                        yield pytest.param(OPS[name], backend, case, dtype, id=text)


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, backend, case, dtype", list(runs()))
def test_forward_and_gradients(op, backend, case, dtype, log):
    kernel = kernel_of(op, backend)
    arguments = verify.bound(op, case.build(dtype, "cpu", 0))
    if reasons := kernel.why_not(op.request(arguments)):
        pytest.skip("; ".join(reasons))
    for check in verify.forward(op, kernel, case, dtype, "cpu"):
        assert check.ok, check
    assert log == ["forward"]
    for check in verify.gradients(op, kernel, case, dtype, "cpu"):
        assert check.ok, check
    assert log == ["forward", "forward", "backward"]


@pytest.mark.parametrize("backend", ["cutlass", "flash"])
@pytest.mark.parametrize("name", ["primes", "empty_between"])
def test_more_sequences_than_a_launch_takes(name, backend, log, monkeypatch):
    """Are computed in several, with the bits of one."""
    op = OPS["attention_varlen"]
    case = next(case for case in op.cases() if case.name == name)
    arguments = case.build(torch.float16, "cpu", 0)
    run = partial(op, backend=backend)
    once = [run(**arguments), *verify.projected(run, arguments, 0)]
    del log[:]
    monkeypatch.setattr({"cutlass": cutlass, "flash": flash}[backend], "_MOST_SEQUENCES", 2)
    parts = [run(**arguments), *verify.projected(run, arguments, 0)]
    assert log == ["forward"] * 4 + ["backward"] * 2
    assert all(map(torch.equal, once, parts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_begin_where_a_kernel_can_load_them(backend, log):
    """A view into a flat buffer may begin at any element; the stand-in refuses what is not at 16 bytes."""
    dtype = torch.float16 if backend == "flash" else torch.float32
    arguments = OPS["attention_varlen"].cases()[3].build(dtype, "cpu", 0)
    for name in ("q", "k", "v"):
        flat = torch.empty(arguments[name].numel() + 1, dtype=dtype)
        arguments[name] = flat[1:].view(arguments[name].shape).copy_(arguments[name]).requires_grad_()
    out = OPS["attention_varlen"](**arguments, backend=backend)
    above = torch.ones(out.numel() + 1, dtype=dtype)[1:].view(out.shape)
    torch.autograd.grad(out, [arguments[name] for name in ("q", "k", "v")], above)
    assert log == ["forward", "backward"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["attention_varlen", "pre_ln_attention"])
def test_no_rows_need_no_kernel(name, backend, log):
    dtype = torch.float16 if backend == "flash" else torch.float32
    arguments = OPS[name].cases()[0].build(dtype, "cpu", 0)
    rows = {key: arguments[key][:0].requires_grad_() for key in ("x", "q", "k", "v") if key in arguments}
    empty = rows | dict(cu_seqlens=torch.zeros(2, dtype=torch.int32), max_seqlen=0)
    out = OPS[name](**(arguments | empty), backend=backend)
    assert len(out) == 0 and log == []
    grads = torch.autograd.grad(out.sum(), list(rows.values()))
    assert [grad.shape for grad in grads] == [row.shape for row in rows.values()]


FAULTS = {
    "no scale": lambda f: lambda *a, scale, **o: f(*a, scale=1.0, **o),
    "too short": lambda f: lambda *a, **o: f(*a[:6], a[6] - 32, a[7] - 32, *a[8:], **o),
    "offsets of another batch": lambda f: lambda *a, **o: f(*a[:4], *(e * 2 // 3 for e in a[4:6]), *a[6:], **o),
    "unaligned": lambda f: lambda q, *a, **o: f(q[..., 1:], *a, **o),
}


@pytest.mark.parametrize("backend", ["cutlass"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_stand_in_sees_a_wrong_call(fault, backend, log, monkeypatch):
    op, calls = OPS["attention_varlen"], torch.ops.aten
    monkeypatch.setattr(calls, "_efficient_attention_forward", FAULTS[fault](calls._efficient_attention_forward))
    case = next(case for case in op.cases() if case.name == "primes")
    try:
        found = verify.forward(op, kernel_of(op, backend), case, torch.float32, "cpu")
    except (AssertionError, RuntimeError):
        return
    assert not all(check.ok for check in found)


@pytest.mark.parametrize("backend", ["cutlass"])
@pytest.mark.parametrize("which", [0, 1], ids=["output", "log-sum-exp"])
def test_the_stand_in_sees_what_is_kept_for_the_backward(which, backend, log, monkeypatch):
    op = OPS["attention_varlen"]
    right = cutlass._backward

    def wrong(arguments, kept, grad_outputs):
        return right(arguments, [t + 0.1 if i == which else t for i, t in enumerate(kept)], grad_outputs)

    kernels = [k for k in registry.kernels(op.name) if k.backend == backend]
    monkeypatch.setattr(registry, "select", lambda *_: replace(kernels[0], backward=wrong))
    found = verify.gradients(op, kernels[0], op.cases()[4], torch.float32, "cpu")
    assert not all(check.ok for check in found)


# --- torch's operators -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train", [False, True])
def test_shapes_are_those_of_torchs_meta_function(train, dtype):
    arguments = OPS["attention_varlen"].cases()[3].build(dtype, "cpu", 0)
    with installed([]):
        real = cutlass._attend(*arguments.values(), train)
    meta = cutlass._attend(*(v.to("meta") if isinstance(v, torch.Tensor) else v for v in arguments.values()), train)
    for ours, torchs in zip((real[0], *real[1]), (meta[0], *meta[1]), strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (torchs.shape, torchs.dtype, torchs.stride())


def test_gradients_do_not_split_the_keys(monkeypatch):
    """Or their parts would be added in another order from run to run."""
    seen, name = {}, "_efficient_attention_backward"
    real = getattr(torch.ops.aten, name)
    monkeypatch.setattr(torch.ops.aten, name, lambda *a, **options: seen.update(options) or real(*a, **options))
    arguments = OPS["attention_varlen"].cases()[3].build(torch.float32, "cpu", 0)
    with installed([]), admitted("cutlass"):
        q = arguments["q"].requires_grad_()
        OPS["attention_varlen"](**arguments, backend="cutlass").sum().backward()
    assert seen["num_splits_key"] == 1 and q.grad is not None


# --- inside the model ------------------------------------------------------------------------------------------------


def model(dtype, backend=None):
    torch.manual_seed(0)
    return trained_like(ESM1(Config(2, 32, 64, 4, max_positions=64), backend=backend)).to(dtype)


@pytest.fixture
def no_other_attention(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("another attention ran")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_runs_it_and_no_other(backend, dtype, log, no_other_attention):
    if (backend, dtype) == ("flash", torch.float32):
        pytest.skip("FlashAttention-2 has half types alone")
    batch, _ = pack_padded(TOKENS)
    with torch.inference_mode():
        out = model(dtype, backend).forward_packed(batch, layers=(1, 2), logits=True)
    assert log == ["forward"] * 2
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in out.representations.values())
    model(dtype, backend).forward_packed(batch, logits=True).logits.float().square().sum().backward()
    assert log == ["forward"] * 4 + ["backward"] * 2


@pytest.mark.parametrize("backend", ["cutlass", "xformers"])
def test_the_model_trains_as_on_the_reference(backend, log):
    batch, _ = pack_padded(TOKENS)

    def gradients(name):
        trained = model(torch.float32, name)
        out = trained.forward_packed(batch, layers=(1, 2), logits=True, contacts=True)
        loss = out.logits.square().sum() + out.representations[1].sum() + sum(map_.sum() for map_ in out.contacts)
        names, parameters = zip(*trained.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))

    ours, plain = gradients(backend), gradients("reference")
    assert "forward" in log and "backward" in log
    largest = max(float(grad.abs().max()) for grad in plain.values() if grad is not None)
    for key, grad in plain.items():
        if grad is not None:
            torch.testing.assert_close(ours[key], grad, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("backend", ["cutlass"])
def test_the_residual_stream_stays_fp32(backend, log):
    arguments = OPS["pre_ln_attention"].cases()[3].build(torch.float16, "cpu", 0)
    arguments["x"] = arguments["x"] + 1000  # in fp16 the update would be rounded away
    out = OPS["pre_ln_attention"](**arguments, backend=backend)
    plain = OPS["pre_ln_attention"].reference(**arguments)
    assert out.dtype == torch.float32 and ((out - plain).abs().max() < 1e-2)


# --- which backend where ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, dtype, expected",
    [
        ((7, 0), torch.float16, "cutlass"),
        ((7, 0), torch.float32, "cutlass"),
        ((7, 0), torch.bfloat16, REFERENCE),
        ((7, 5), torch.float16, "cutlass"),
        ((8, 0), torch.bfloat16, "cutlass"),
        ((8, 6), torch.float32, "cutlass"),
        ((9, 0), torch.bfloat16, "cutlass"),
        ((9, 0), torch.float64, REFERENCE),
        ((10, 0), torch.bfloat16, REFERENCE),
        ((12, 0), torch.float32, REFERENCE),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_the_choice_by_architecture(arch, dtype, expected, grad):
    request = Request("cuda", arch, dtype, 64, grad)
    for name in ("attention_varlen", "pre_ln_attention"):
        assert select(name, request).backend == expected
    for name in set(OPS) - {"attention_varlen", "pre_ln_attention"}:
        assert select(name, request).backend == REFERENCE


@pytest.mark.parametrize("arch", [(7, 0), (7, 5)])
def test_before_sm_80_cuda_and_cutlass_come_first(arch):
    """Triton and flash decline there, and what has never run on a GPU leaves it to what has."""
    explained = dict(registry.explain("attention_varlen", Request("cuda", arch, torch.float16, 64, True)))
    willing = [name for name in explained if name not in ("triton", "flash", "xformers")]
    assert explained["flash"] == [f"needs compute capability 8.0 to 9.x, this GPU has {arch[0]}.{arch[1]}"]
    assert willing[:2] == ["cuda", "cutlass"] and explained["cuda"] and not explained["cutlass"]
    if "triton" in explained:
        assert explained["triton"] == [f"needs compute capability 8.0, this GPU has {arch[0]}.{arch[1]}"]


def test_a_cpu_prefers_its_own_kernels():
    request = Request("cpu", None, torch.float32, 64, False)
    names = [name for name, reasons in registry.explain("pre_ln_attention", request) if not reasons]
    assert names in (["cpu", REFERENCE], [REFERENCE])  # the latter on a level of instructions that was not measured


@pytest.mark.parametrize(
    "backend, change, reason",
    [
        ("cutlass", dict(device="cpu", arch=None), "needs a CUDA device, the tensors are on cpu"),
        ("cutlass", dict(arch=(7, 0)), "has bfloat16 from compute capability 8.0 on, this GPU has 7.0"),
        ("cutlass", dict(arch=(3, 7), dtype=torch.float32), "needs compute capability 5.0 to 9.x, this GPU has 3.7"),
        ("cutlass", dict(arch=(12, 0)), "needs compute capability 5.0 to 9.x, this GPU has 12.0"),
        ("cutlass", dict(dtype=torch.float64), "has float32, float16 and bfloat16, not float64"),
        ("cutlass", dict(head_dim=20), "multiple of 8 in bfloat16, this is 20"),
        ("cutlass", dict(head_dim=18, dtype=torch.float32), "multiple of 4 in float32, this is 18"),
        ("xformers", dict(arch=(7, 5)), "needs compute capability 8.0, this GPU has 7.5"),
        ("flash", dict(arch=(7, 5)), "needs compute capability 8.0 to 9.x, this GPU has 7.5"),
        ("flash", dict(dtype=torch.float32), "has float16 and bfloat16, not float32"),
        ("flash", dict(head_dim=20), "multiple of 8 up to 256, this is 20"),
        ("xformers", dict(arch=(10, 0), dtype=torch.float32), "float32 up to compute capability 9.0"),
        ("triton", dict(arch=(7, 0)), "needs compute capability 8.0, this GPU has 7.0"),
    ],
)
def test_a_name_runs_or_says_why_not(backend, change, reason):
    if registry.backends()[backend] is not None:
        pytest.skip(f"{backend} is not installed")
    for name in ("attention_varlen", "pre_ln_attention"):
        with pytest.raises(BackendError, match=reason):
            select(name, A100._replace(**change), backend)


@pytest.mark.parametrize("arch, cutlass_runs", [("7.0", True), ("sm_90", True), ("120", False)])
def test_info_shows_the_choice_for_a_gpu_that_is_elsewhere(arch, cutlass_runs, capsys):
    assert main(["info", "--arch", arch]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    columns = next(line for line in lines if "cutlass" in line and "reference" in line)
    cells = dict(zip(columns, next(line for line in lines if line[:1] == ["pre_ln_attention"])[1:], strict=True))
    assert (cells["cutlass"] == "*") == cutlass_runs and (cells["reference"] == "*") == (not cutlass_runs)
    assert "machine" not in text and "only by name on a GPU, where it has never run" in text or arch == "7.0"


@pytest.mark.parametrize("text", ["", "x", "sm_", "7.0.0", "-7"])
def test_no_architecture(text, capsys):
    with pytest.raises(SystemExit):
        main(["info", f"--arch={text}"])
    assert "such as 8.0 or sm_80" in capsys.readouterr().err


def test_another_gpu_makers_torch_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert cutlass.why_not(A100) == ["needs an NVIDIA GPU, this torch is built for ROCm"]
