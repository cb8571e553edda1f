"""CUDA graphs of all layers, without a GPU: buckets, copies, edited weights, captures of others, failures, eviction.

A stand-in for torch.cuda.graph computes on the CPU: a replay reads the tensors that were there at the capture, and
writes those that it gave, as a graph's kernels do.
"""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from esm_fast import ops
from esm_fast.inference import qualifying
from esm_fast.models.esm1 import ESM1, Config
from esm_fast.ops import registry
from esm_fast.ops.transformer_stack import StackPool, _case
from esm_fast.sequences.batching import pack

registry.backends()
from esm_fast.kernels import graphs  # noqa: E402

STACK = ops.transformer_stack
KERNEL = next(kernel for kernel in registry.kernels("transformer_stack") if kernel.backend == "graphs")


class Toy(graphs.Cuda):
    """busy_now: somebody captures. broken: what a capture raises."""

    device = "cpu"

    def __init__(self):
        super().__init__()
        self.busy_now, self.broken, self.now, self.log = False, None, 0, []

    def busy(self, device):
        return self.busy_now

    def stream(self, device):
        return self.now

    def capture(self, compute, device):
        self.log.append("capture")
        if self.broken:
            raise self.broken
        found = compute()

        def replay():
            self.log.append("replay")
            with torch.inference_mode():  # a graph writes memory, of whatever kind its tensors are
                for old, new in zip(found, compute(), strict=True):
                    old.copy_(new)

        return replay, found


pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.fixture
def toy(monkeypatch):
    made = Toy()
    monkeypatch.setattr(graphs, "_cuda", made)
    monkeypatch.setattr(graphs, "_graphs", graphs.Graphs(limit=3))
    with torch.inference_mode():
        yield made


def given(lengths, seed=0, rotary=False, depth=3):
    arguments = _case("some", lengths, 2, 16, 80, depth, rotary=rotary).build(torch.float32, "cpu", seed)
    return arguments | {"layers": given_layers(depth)}


def given_layers(depth, known={}):  # noqa: B006 - the same tensors in all calls of a test run
    if depth not in known:
        known[depth] = _case("some", [3], 2, 16, 80, depth).build(torch.float32, "cpu", 9)["layers"]
    return known[depth]


def both(arguments):
    """(by graphs, by the halves)"""
    got = STACK(**arguments, backend="graphs")
    values = STACK.bind((), arguments)
    stack, _ = graphs.halves_of(values["layers"], registry.request_of(torch.device("cpu"), dtype=torch.float32), None)
    names = ("x", "cu_seqlens", "max_seqlen", "layers", "heads", "rotary")
    streams = list(stack(*(values[name] for name in names), frozenset(values["return_layers"])))
    return got, (streams[-1], *(streams[number - 1] for number in values["return_layers"]))


def equal(got, wanted):
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("rotary", [False, True])
def test_batches_of_a_bucket_replay_one_graph_with_their_own_bits(toy, rotary):
    """Shorter and longer ones in turns, so that what an earlier one left is there."""
    for seed, lengths in enumerate([[40, 3, 17], [9, 0, 33], [60, 1, 2], [5, 40, 1], [62, 1, 1]]):
        got, wanted = both(given(lengths, seed, rotary) | {"return_layers": (2, 1)})
        assert equal(got, wanted), lengths
    assert toy.log == ["capture", *["replay"] * 4]
    assert len(got[0]) == 64 and len(graphs._graphs.kept) == 1


@pytest.mark.parametrize(
    "tokens, sequences, longest, wanted",
    [(1, 1, 1, (64, 2, 64)), (64, 2, 64, (64, 4, 64)), (65, 3, 65, (128, 4, 128)), (1025, 9, 600, (1088, 16, 1024)),
     (2048, 7, 1024, (2048, 8, 1024))],
)  # fmt: skip
def test_buckets_hold_what_they_are_for(tokens, sequences, longest, wanted):
    assert graphs.bucket(tokens, sequences, longest) == wanted


def test_a_graph_of_one_mode_serves_another(toy):
    assert equal(*both(given([9]))) and equal(*both(given([9])))
    with torch.inference_mode(False), torch.no_grad():
        got, wanted = both(given([9]))
        got[0].add_(1)  # it is the caller's
        assert equal(got, [wanted[0] + 1])
    assert equal(*both(given([9]))) and toy.log == ["capture", *["replay"] * 3]


def test_other_sizes_layers_streams_and_kept_streams_are_other_graphs(toy):
    for change in ({}, {"return_layers": (1,)}, {"layers": given_layers(2)}):
        for _ in range(2):
            got, wanted = both(given([9, 4]) | change)
            assert equal(got, wanted)
    toy.now = 7  # another stream, whose copies would not be in order with the first one's
    assert equal(*both(given([9, 4])))
    assert toy.log.count("capture") == 3
    assert len(graphs._graphs.kept) == 3  # the limit: the first one is gone


def test_least_recently_used_graphs_are_given_up(toy):
    for lengths in ([9], [80], [9], [80], [9], [150], [150], [300], [300]):
        both(given(lengths))
    sizes = [key[0][0] for key in graphs._graphs.kept]
    assert sizes == [64, 192, 320] and toy.log.count("capture") == 4


def test_weights_edited_in_place_count_and_moved_ones_are_captured_again(toy):
    torch.manual_seed(0)
    model = ESM1(Config(2, 32, 64, 2, max_positions=64), backend="graphs").requires_grad_(False)
    ids, one = np.full(20, 5, dtype=np.uint8), np.array([0])
    batch = pack(ids, one, np.array([20]), one)

    def run(times=1):
        for _ in range(times):
            found = model.forward_packed(batch, layers=(1, 2)).representations
        return list(found.values())

    def right():
        """Once more from the halves, which know of no graph."""
        got, model.backend = run(), None
        wanted, model.backend = run(), "graphs"
        return equal(got, wanted)

    before, weight = run(5), model.layers[0].fc1.weight
    assert toy.log[-1] == "replay" and right()
    captures = toy.log.count("capture")
    with torch.inference_mode(False):
        weight.data.mul_(2)
    assert not equal(run(), before) and right()
    for edit in (
        lambda: 2 * weight.data,
        lambda: torch.cat([weight.data, 3 * weight.data])[: len(weight)],
        lambda: weight.data.as_strided(weight.shape, weight.stride(), weight.numel()),  # the other part of that memory
        lambda: weight.data.clone(),
    ):
        weight.data = edit()
        assert right() and run(3) and right() and toy.log[-1] == "replay"
        captures, then = toy.log.count("capture"), captures
        assert captures > then
    model.layers[1].final_layer_norm.eps = 0.1
    assert right() and run(3) and right() and toy.log.count("capture") > captures


def test_nothing_is_captured_while_somebody_else_captures(toy):
    both(given([9])), both(given([9]))
    toy.busy_now = True
    assert equal(*both(given([9]))) and equal(*both(given([80]))) and equal(*both(given([80])))
    assert toy.log == ["capture", "replay"]


def test_what_cannot_be_captured_runs_without_and_says_so_once(toy):
    toy.broken = RuntimeError("operation not permitted when stream is capturing")
    both(given([9]))
    with pytest.warns(RuntimeWarning, match="not captured, its batches run without: RuntimeError: operation not perm"):
        assert equal(*both(given([9])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(*both(given([9])))
    toy.broken = None
    assert equal(*both(given([80]))) and equal(*both(given([80]))) and toy.log == ["capture", "capture", "replay"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_capture_is_on_a_stream_of_the_device_and_leaves_the_callers_current(monkeypatch, broken):
    """torch's own stream for captures is of whichever device asked first, and stays current where a capture fails."""
    log, current = [], ["caller"]

    class Entered:
        def __init__(self, name, *, leaves=True):
            self.name, self.leaves = name, leaves

        def __enter__(self):
            self.before = current[0]
            current[0] = self.name

        def __exit__(self, *_):
            if not self.leaves:
                raise RuntimeError("capture_end")
            current[0] = self.before

    def graph(graph, *, pool, stream, capture_error_mode):
        log.append((pool, stream, capture_error_mode))
        return Entered(stream, leaves=not broken)

    for name, value in {
        "current_stream": lambda device: type("Stream", (), {"cuda_stream": 5, "name": current[0]}),
        "device": lambda device: log.append(device) or Entered(current[0]),
        "stream": lambda stream: Entered(stream.name),
        "Stream": lambda device: f"capture on {device}",
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: type("CUDAGraph", (), {"replay": None}),
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    cuda, device = graphs.Cuda(), torch.device("cuda", 1)
    for _ in range(2):
        if broken:
            with pytest.raises(RuntimeError, match="capture_end"):
                cuda.capture(list, device)
        else:
            assert cuda.capture(lambda: [current[0]], device)[1] == ["capture on cuda:1"]
        assert current == ["caller"]
    assert log == [device, ("pool", "capture on cuda:1", "thread_local")] * 2


@pytest.mark.parametrize("change", [{"x": 2049}, {"x": 0}, {"kept": 5}])
def test_what_a_graph_is_not_for_runs_as_it_did(toy, change):
    rows = change.get("x", 10)
    arguments = given([rows], depth=6) | {"return_layers": tuple(range(1, 1 + change.get("kept", 0)))}
    assert equal(*both(arguments)) and equal(*both(arguments)) and toy.log == []


def test_pools_are_of_the_batch(toy):
    for lengths in ([9, 4], [12, 2], [5, 5]):
        arguments = given(lengths)
        rows = torch.rand(sum(lengths))
        pools = [StackPool(layer, "pool", rows) for layer in (1, 3)]
        x, *pooled = STACK(**arguments | {"pools": pools}, backend="graphs")
        _, (last, first) = both(arguments | {"return_layers": (1,)})
        assert equal(pooled, [ops.pool(stream, arguments["cu_seqlens"], rows) for stream in (first, last)])


def test_gradients_do_not_come_from_graphs(toy):
    request = registry.request_of(torch.device("cpu"), dtype=torch.float32, grad=True)
    assert KERNEL.why_not(request) == ["has no gradients"] and KERNEL.why_not(request._replace(grad=False)) == []
    assert "only by name" in KERNEL.yields(request)[0]


TASK = dict(op="transformer_stack", device="cpu", dtype="float32", backend="graphs", grad=False, head_dim=64)


def test_a_qualification_proves_them_and_finds_a_batch_that_was_not_copied(toy, monkeypatch):
    monkeypatch.setattr(qualifying, "bench_cases", lambda task: STACK.cases()[:1])
    some = [case for case in STACK.cases() if case.name in ("empty_between", "primes", "rotary")]
    monkeypatch.setitem(registry.OPS, "transformer_stack", replace(STACK, cases=lambda: some))
    with torch.inference_mode(False):
        assert qualifying.prove(TASK)[0] == "proven" and "replay" not in toy.log[:1]
        monkeypatch.setattr(toy, "capture", lambda compute, device: (lambda: None, [x + 1 for x in compute()]))
        graphs._graphs.kept.clear()
        assert qualifying.prove(TASK)[0] in ("wrong", "irreproducible")


def test_they_are_compared_with_the_halves_that_would_run(toy, monkeypatch):
    ran = []
    monkeypatch.setattr(qualifying, "bench_cases", lambda task: STACK.cases()[:1])
    monkeypatch.setattr(qualifying, "select", lambda *_: registry.kernels("transformer_stack")[-1])
    monkeypatch.setattr(qualifying, "stack_call", lambda backend, **_: lambda: ran.append(qualifying.verdicts._held))
    choices = "gelu_ffn/float32/0/forward=reference"
    found = qualifying.compare(TASK | {"backends": ["graphs", "reference"], "choices": choices})
    assert set(found) == {"graphs", "reference"} and ran[0] == {"gelu_ffn/float32/0/forward": "reference"}
