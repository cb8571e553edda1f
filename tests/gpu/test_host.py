"""What the host does for a GPU: the launches of all layers together are those of the halves, one by one.

On a driver that launches nothing, below Triton's own launcher.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from esm_fast.ops import registry
from esm_fast.ops.transformer_stack import _case

triton = pytest.importorskip("triton", reason="triton is not installed")
sys.path.append(str(Path(__file__).parents[2] / "benches"))

import host_time  # noqa: E402
from esm_fast.kernels.triton import common, launch  # noqa: E402
from esm_fast.kernels.triton import transformer_stack as stack  # noqa: E402
from stub_driver import stubbed  # noqa: E402

ARCH = 89  # the stub's device: no other test has one of this number


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("triton"))


FOUND = []


def note(x, y, z, stream, kernel, *rest):
    values = [tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in rest[-1]]
    addresses = [v.data_ptr() for v in rest[-1] if isinstance(v, torch.Tensor)]
    FOUND.append((kernel, (x, y, z), values, addresses))


@pytest.fixture
def launched(cache, monkeypatch):
    """Every launch: (kernel, grid, what it was given but for tensors, where these are)."""
    if common.interpreted() or not shutil.which("gcc") or torch.cuda.is_available():
        pytest.skip("needs a compiler's launches, and no other driver in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", cache)
    with stubbed(ARCH, note), torch.inference_mode():
        yield FOUND


def run(arguments, found, kept=()):
    """(the launches of all layers together, those one by one)"""
    names = ("x", "cu_seqlens", "max_seqlen", "layers", "heads", "rotary")
    given = [arguments[name] for name in names]
    result = []
    for call in (lambda: stack.stack(*given, kept), lambda: stack._by_halves(*given)):
        del found[:]
        streams = list(call())
        assert len(streams) == len(arguments["layers"])
        result.append((list(found), streams))
    return result


@pytest.mark.parametrize("rotary, release", [(False, launch._KNOWN), (True, "another")])
def test_all_layers_launch_what_their_halves_do(launched, rotary, release, monkeypatch):
    """Of a release whose launcher is known, and of another by that launcher's own call."""
    monkeypatch.setattr(launch, "_KNOWN", release)
    stack._bound.cache_clear()
    arguments = _case("three", [40, 0, 300], 2, 16, 80, 3, rotary=rotary).build(torch.bfloat16, "cpu", 0)
    tensors = [tensor for layer in arguments["layers"] for tensor in layer.tensors]
    outside = {t.data_ptr() for t in (*tensors, arguments["x"], arguments["cu_seqlens"])}
    list(stack.stack(*(arguments[n] for n in ("x", "cu_seqlens", "max_seqlen", "layers", "heads", "rotary")), ()))
    (together, streams), (halves, _) = run(arguments, launched)  # all bound by now
    assert len(together) == (8 if rotary else 7) * 3
    assert [(kernel, grid) for kernel, grid, *_ in together] == [(kernel, grid) for kernel, grid, *_ in halves]
    for (kernel, _, values, addresses), (_, _, wanted, others) in zip(together, halves, strict=True):
        numbers = [[v for v in each if not isinstance(v, tuple)] for each in (values, wanted)]
        assert numbers[0] == numbers[1], kernel
        assert [a for a in addresses if a in outside] == [a for a in others if a in outside], kernel
    assert streams[0] is streams[1] is streams[2]  # nobody kept one


def test_streams_that_are_kept_are_not_written_again(launched):
    arguments = _case("four", [40, 30], 2, 16, 80, 4).build(torch.bfloat16, "cpu", 0)
    (_, streams), _ = run(arguments, launched, kept=(1, 3))
    assert streams[2] is streams[1] and len({id(streams[number]) for number in (0, 2, 3)}) == 3


def uneven(layer, how):
    if how == "another type":
        return layer._replace(fc1_bias=layer.fc1_bias.float())
    if how == "a view":
        return layer._replace(q_weight=layer.q_weight.T)
    return layer._replace(fc2_bias=torch.cat([layer.fc2_bias[:1], layer.fc2_bias])[1:])


@pytest.mark.parametrize("how", ["another type", "a view", "between two multiples of 16 bytes"])
def test_layers_that_are_not_alike_run_by_halves(launched, how):
    """A compilation for bound types and alignment would read something else."""
    arguments = _case("two", [40], 2, 16, 80, 2).build(torch.bfloat16, "cpu", 0)
    arguments["layers"][1] = uneven(arguments["layers"][1], how)
    assert stack._sizes([arguments["x"], arguments["cu_seqlens"]], arguments["layers"], 2) is None
    (together, _), (halves, _) = run(arguments, launched)
    assert [one[:2] for one in together] == [one[:2] for one in halves]


def test_a_model_runs_them_together_and_a_profiler_sees_each_launch(launched, monkeypatch):
    model, batch = host_time.model_of(), host_time.batch_of()
    assert registry._STACKS["triton"] is stack.stack
    model.forward_packed(batch, layers=(33,))
    del launched[:]
    model.forward_packed(batch, layers=(33,))
    assert len(launched) == 33 * 7 + 2  # and the embedding's
    hook = triton.knobs.runtime.launch_enter_hook
    monkeypatch.setattr(hook, "calls", [lambda metadata: None])
    monkeypatch.setattr(stack, "_launched", None)
    assert model.forward_packed(batch, layers=(33,)).representations.keys() == {33}
