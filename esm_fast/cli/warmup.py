"""esm-fast warmup: compiles the GPU kernels that a model needs, so that its first batch does not wait for them."""

import argparse
import sys
import time
from collections import Counter
from contextlib import nullcontext

from .common import InputError, add_model, architecture, progress, require_device

NAME = "warmup"
ORDER = 52
HELP = "compile the GPU kernels of a model beforehand"
DESCRIPTION = """\
Runs everything that a model of these sizes does once, on tiny batches with random weights, so that the
kernels are compiled into Triton's cache (TRITON_CACHE_DIR, by default ~/.triton/cache) and, on a GPU, loaded.
With --arch it compiles for a GPU that is elsewhere, such as while a container is built, and runs nothing."""
EXAMPLES = """\
  esm-fast warmup --model esm1b_t33_650M_UR50S --dtype bfloat16 --backend triton
  esm-fast warmup --model esm1b_t33_650M_UR50S --dtype bfloat16 --backend triton --arch sm_80
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, dtype="auto")
    parser.add_argument("--arch", type=architecture, metavar="X.Y", help="compile for this compute capability, 8.0 say")
    parser.add_argument("--qualify", action="store_true", help="then prove and time the kernels, as esm-fast qualify")
    parser.add_argument("--inference", action="store_true", help="leave out the kernels of training")


def run(args: argparse.Namespace) -> None:
    import torch

    from .. import ops
    from ..inference import warmup
    from ..inference.dtype import of_gpu
    from ..inference.load import DTYPES
    from ..ops.registry import Request

    if args.qualify and args.arch:
        raise InputError("--qualify proves kernels on the GPU that is here; leave --arch out")
    config = _config(args.model)
    device = _device(args)
    arch = args.arch or (torch.cuda.get_device_capability(device) if device.startswith("cuda") else None)
    if arch is None:
        text = "nothing needs warming on a CPU: its kernels are compiled, and weights are packed when they are loaded"
        args.summary.say(text, compiled={}, device=device)
        _qualify(args, device, config)
        return
    dtype = DTYPES[of_gpu(arch)[0] if args.dtype == "auto" else args.dtype]
    if dtype == torch.int8:
        raise InputError("int8 is for CPUs; give another --dtype for a GPU")
    head_dim = config.embed_dim // config.attention_heads
    request = Request("cuda", arch, dtype, head_dim, not args.inference)
    try:
        chosen = {ops.select(name, request, args.backend).backend for name in ops.OPS}
    except ops.BackendError as error:
        raise InputError(str(error)) from None
    if args.arch and "triton" not in chosen:
        there = " and ".join(sorted(chosen))
        args.summary.say(f"nothing to compile: {there} run there, as they come; --backend triton compiles", compiled={})
        return
    with _compiling_for(args.arch), _Compilations() as compiled:
        for train in (False, True)[: 1 if args.inference else 2]:
            options = dict(dtype=dtype, device=device, backend=args.backend, train=train)
            _do(list(warmup.steps(config, **options)))
        if not args.arch:
            torch.cuda.synchronize(device)
    compiled.tell(args.summary.say, "sm_{}{}".format(*arch))
    _qualify(args, device, config)


def _qualify(args: argparse.Namespace, device: str, config) -> None:
    """For the model's size of heads."""
    from .qualify import tell

    if args.qualify:
        grads = (False,) if args.inference else (False, True)
        tell(args.summary, device, (), grads=grads, head_dims=(config.head_dim,))


def _config(name: str):
    """The sizes of a model; of a published one without its file."""
    from .. import hub, weights
    from ..models.family import published

    known = name.removeprefix("random:").partition(":")[0]
    if hub.is_published(known) or name.startswith("random:"):
        known = hub.canonical_name(known)
        if known not in published():
            raise InputError(f"{name!r} is no model; choose one of {', '.join(published())}")
        return published()[known]
    return weights.read(hub.resolve(name)).config


def _device(args: argparse.Namespace) -> str:
    """Where the model runs; with --arch, where the tensors of launches lie that only compile."""
    import torch

    if args.arch:
        return "cpu"
    if args.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    require_device(args.device)
    return args.device


def _compiling_for(arch: tuple[int, int] | None):
    if arch is None:
        return nullcontext()
    from ..kernels.triton.elsewhere import compiling_for

    return compiling_for(10 * arch[0] + arch[1])


def _do(steps: list) -> None:
    with progress(len(steps), "steps") as bar:
        for name, step in steps:
            bar.set_description(name)
            step()
            bar.update()


class _Compilations:
    """What Triton compiled, or found in its cache, meanwhile."""

    def __enter__(self):
        self.new, self.cached, self.begin = Counter(), Counter(), time.perf_counter()
        self.knobs = None
        try:
            from triton import knobs
        except ImportError:  # then no kernel of Triton runs
            return self
        self.knobs, self.before = knobs, knobs.compilation.listener
        knobs.compilation.listener = self._note
        return self

    def __exit__(self, *_):
        if self.knobs is not None:
            self.knobs.compilation.listener = self.before

    def _note(self, *, src, cache_hit: bool, **_) -> None:
        (self.cached if cache_hit else self.new)[src.name] += 1

    def tell(self, say, where: str) -> None:
        seconds = time.perf_counter() - self.begin
        say(*(f"  {name:28} {count}" for name, count in sorted(self.new.items())), compiled=dict(self.new))
        new, cached = self.new.total(), self.cached.total()
        say(f"compiled {new} kernels for {where}, {cached} were in the cache; {seconds:.0f} s")
        if self.knobs is not None:
            print(f"cache     {self.knobs.cache.dir}", file=sys.stderr)
