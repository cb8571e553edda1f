"""All layers of a small batch as one CUDA graph, replayed: the host launches once where it launched hundreds of times.

The kernels inside are those that run without it. A graph is of a bucket: of so many tokens, sequences, and tokens of
the longest one, each rounded up; what a batch has less are the rows of one more sequence, whose results nobody gets,
and empty sequences. What a batch has is copied into a graph's own tensors, and results out of them. Batches of more
than MOST_TOKENS tokens, which keep a GPU busy for longer than the launches take, run as they did.

A graph holds the addresses of weights, which are compared in every call; values edited in place count. It is captured
when a bucket is met for the second time, never while somebody else captures, and at most LIMIT are kept. What cannot be
captured runs without, and says so once.
Unproven: no GPU was at hand; the logic ran on a stand-in for torch.cuda.graph. So it runs by name, or where
`esm-fast qualify` found it right and faster on the GPU at hand.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from esm_fast.ops.checked import Checked
from esm_fast.ops.registry import Request, implements, request_of
from esm_fast.ops.transformer_stack import halves_of, pooled_through

BACKEND = "graphs"
MOST_TOKENS = 2048
LIMIT = 16  # graphs
_MOST_KEPT = 4  # streams that a graph gives beside the last one: they lie in its memory
_STEP = 64  # tokens are a multiple of it, and the longest sequence no shorter: rows to spare are one sequence


def why_not(request: Request) -> list[str]:
    """What keeps graphs from running a request; see `registry.Request`."""
    reasons = [] if request.device == _cuda.device else [f"needs a CUDA device, the tensors are on {request.device}"]
    return reasons + ["has no gradients"] * request.grad


def yields(request: Request) -> list[str]:
    return ["only by name on a GPU, where it has never run here: esm-fast qualify tries it"]


class Cuda:
    """What is asked of torch.cuda; a test has its own."""

    device = "cuda"

    def __init__(self):
        self._places: dict[Hashable, tuple] = {}  # of a device's stream: a pool, and a stream to capture

    def busy(self, device: torch.device) -> bool:
        """Whether a graph is being captured, or torch would compute something else now than it captured."""
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing() or torch.is_autocast_enabled("cuda")

    def stream(self, device: torch.device) -> Hashable:
        return torch.cuda.current_stream(device).cuda_stream

    def capture(self, compute: Callable[[], list], device: torch.device) -> tuple[Callable[[], None], list]:
        """(replay, what compute returned, which each replay writes again). Graphs of a stream share their memory.

        torch's own stream for captures is of one device, whichever asked first, and all users' streams would share the
        workspaces of its products. Where a capture fails, torch may leave that stream the current one.
        """
        where, now = (device, self.stream(device)), torch.cuda.current_stream(device)
        with torch.cuda.device(device), torch.cuda.stream(now):
            if where not in self._places:
                self._places[where] = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
            pool, own = self._places[where]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=own, capture_error_mode="thread_local"):  # it synchronizes
                found = compute()
        return graph.replay, found


_cuda = Cuda()


class Graph(NamedTuple):
    """x, ends and rotary: what is read; found: the streams that are written, after the layers `kept` and the last."""

    x: torch.Tensor
    ends: torch.Tensor
    rotary: torch.Tensor | None
    replay: Callable[[], None]
    found: list[torch.Tensor]

    def __call__(self, x, cu_seqlens, rotary) -> list[torch.Tensor]:
        _fill(self, x, cu_seqlens, rotary)
        self.replay()
        return [stream[: len(x)].clone() for stream in self.found]


def _fill(given, x, cu_seqlens, rotary) -> None:
    given.x[: len(x)].copy_(x)
    given.ends[: len(cu_seqlens)].copy_(cu_seqlens)
    given.ends[len(cu_seqlens) :].fill_(len(given.x))
    if rotary is not None:
        given.rotary[:, : len(x)].copy_(rotary)


def bucket(tokens: int, sequences: int, longest: int) -> tuple[int, int, int]:
    """Tokens up to a multiple of 64; of sequences one more at least, and their longest, up to powers of two."""
    return -(-tokens // _STEP) * _STEP, _power(sequences + 1), max(_STEP, _power(longest))


def _power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


class Graphs:
    """The graphs of a process, by what they were captured of; least recently used ones are given up."""

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self.kept: OrderedDict[Hashable, Graph | None] = OrderedDict()  # None: met once, or not to be captured
        self.failed: dict[Hashable, str] = {}
        self._lock = threading.Lock()

    def run(self, key: Hashable, eagerly: Callable, make: Callable, x, cu_seqlens, rotary) -> list[torch.Tensor]:
        """eagerly(x, cu_seqlens, rotary) -> streams; make() -> a Graph of it."""
        with self._lock:  # its tensors are of one call at a time, whose copies are launched before the next one's
            graph = self._found(key, make)
            if graph is not None:
                return graph(x, cu_seqlens, rotary)
        return eagerly(x, cu_seqlens, rotary)

    def _found(self, key: Hashable, make: Callable) -> Graph | None:
        if key not in self.kept:
            self.kept[key] = None
            while len(self.kept) > self.limit:
                self.failed.pop(self.kept.popitem(last=False)[0], None)
            return None
        self.kept.move_to_end(key)
        if self.kept[key] is None and key not in self.failed:
            try:
                self.kept[key] = make()
            except Exception as error:  # a driver's, a kernel's that waits, memory's
                self.failed[key] = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"a CUDA graph of {BACKEND} was not captured, its batches run without: {self.failed[key]:.300}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self.kept[key]


_graphs = Graphs()


def _addresses(layers) -> Hashable:
    """What a graph has of weights: where they lie and what they are, but not their values."""
    if type(layers) is Checked and layers.even and not torch.is_grad_enabled():  # so they were compared in this call
        return layers.state
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    facts = ((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)
    return tuple(facts), tuple(layer.numbers for layer in layers)


def _streams(stack: Callable, kept: tuple[int, ...], x, cu_seqlens, max_seqlen, layers, heads, rotary) -> list:
    """After the layers in `kept`, and the last."""
    found = enumerate(stack(x, cu_seqlens, max_seqlen, layers, heads, rotary, frozenset(kept)), start=1)
    return [stream for number, stream in found if number in kept or number == len(layers)]


def _captured(stack: Callable, kept, sizes, x, cu_seqlens, layers, heads, rotary) -> Graph:
    tokens, sequences, longest = sizes
    with torch.inference_mode(False):  # or later calls that are in no such mode could not write them
        own = Graph(
            torch.zeros(tokens, x.shape[1], dtype=x.dtype, device=x.device),
            torch.zeros(sequences + 1, dtype=cu_seqlens.dtype, device=x.device),
            None if rotary is None else torch.zeros(2, tokens, rotary.shape[2], dtype=rotary.dtype, device=x.device),
            lambda: None,
            [],
        )
    _fill(own, x, cu_seqlens, rotary)

    def compute() -> list[torch.Tensor]:
        return _streams(stack, kept, own.x, own.ends, longest, layers, heads, own.rotary)

    compute()  # what is compiled, loaded or made once cannot be part of a graph
    replay, found = _cuda.capture(compute, x.device)
    return own._replace(replay=replay, found=found)


@implements("transformer_stack", backend=BACKEND, why_not=why_not, yields=yields)
def transformer_stack(x, cu_seqlens, max_seqlen, layers, heads, return_layers, rotary, pools):
    """See `esm_fast.ops.transformer_stack`."""
    request = request_of(x.device, dtype=layers[0].q_weight.dtype, head_dim=x.shape[1] // heads)
    stack, chosen = halves_of(layers, request, None)
    kept = tuple(sorted({*return_layers, *(pool.layer for pool in pools)} - {len(layers)}))

    def eagerly(x, cu_seqlens, rotary) -> list[torch.Tensor]:
        return _streams(stack, kept, x, cu_seqlens, max_seqlen, layers, heads, rotary)

    if not len(x) or len(x) > MOST_TOKENS or len(kept) > _MOST_KEPT or _cuda.busy(x.device):
        found = eagerly(x, cu_seqlens, rotary)
    else:
        sizes = bucket(len(x), len(cu_seqlens) - 1, max_seqlen)
        about = x.device, _cuda.stream(x.device), x.dtype, rotary is None, torch.backends.cuda.matmul.fp32_precision
        key = sizes, kept, chosen, heads, about, _addresses(layers)

        def make() -> Graph:
            return _captured(stack, kept, sizes, x, cu_seqlens, layers, heads, rotary)

        found = _graphs.run(key, eagerly, make, x, cu_seqlens, rotary)
    streams = dict(zip((*kept, len(layers)), found, strict=True))
    return pooled_through(streams.items(), None, x, cu_seqlens, return_layers, pools)
