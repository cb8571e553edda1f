"""Ops and the kernels that implement them.

An op is its contract: a signature, what its arguments must be, a differentiable pure-PyTorch reference, test cases and
a cost. A kernel is one backend's implementation of one op. `select` chooses a kernel by the order of `preference`: each
kernel that cannot run says why, and a backend asked for by name runs or raises those reasons. `reference` comes last.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from .. import _C
from . import opaque, verdicts
from .contract import Contract
from .gradients import run_with_gradients
from .preference import REFERENCE, priority_of

OPS: dict[str, "Op"] = {}
_KERNELS: dict[str, list["Kernel"]] = {}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run; the message lists why."""


class Request(NamedTuple):
    """What a selection may depend on: nothing that changes from batch to batch.

    device: torch device type; arch: CUDA compute capability or None; dtype: of the weights (or of q for attention);
    head_dim: of the attention ops, else None; grad: whether a gradient will be asked for.
    level: the CPU kernels' instruction-set level; name: a GPU's; executors: what backends run on in the device's place,
    see `runs_on`. Left out, they are those of this process.
    """

    device: str
    arch: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int | None
    grad: bool
    level: str = ""
    name: str | None = None
    executors: tuple = ()


class Cost(NamedTuple):
    """Floating point operations, and the bytes an ideal kernel must read and write.

    between: what kernels on a GPU write and read besides, because no tile of theirs can hold it: rows under a norm, q,
    k and v under attention, a hidden activation.
    """

    flops: int
    bytes: int
    between: int = 0


class Case(NamedTuple):
    """One test or bench input. `build(dtype, device, seed)` returns the op's keyword arguments."""

    name: str
    build: Callable[[torch.dtype, str, int], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One backend's implementation of one op, with the op's own signature.

    why_not(request) says why it cannot run a request; yields(request) why it is left out of an unnamed choice although
    it could run: where it was measured slower than the next kernel.
    backward(arguments, kept, grad_outputs) returns one gradient (or None) per argument, in signature order, for a
    sequence of tensors one per element; kept are the outputs, or what train(*arguments) -> (outputs, kept) chose to
    keep. Without backward, the gradient is the reference's, recomputed from the inputs; unless there is
    differentiable(*arguments), to be called instead of forward where a gradient is due: made of torch's operations and
    of ops, so that autograd follows it by itself. For some kernels that is forward itself.
    """

    op: str
    backend: str
    forward: Callable
    backward: Callable | None = None
    train: Callable | None = None
    priority: int = 0
    why_not: Callable[[Request], list[str]] = lambda request: []
    yields: Callable[[Request], list[str]] = lambda request: []
    differentiable: Callable | None = None


def _alone(outputs: list[torch.Tensor]):
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


@dataclass(frozen=True)
class Op:
    """A contract. Calling it checks the arguments, selects a kernel and runs it, with gradients where they are due.

    Arguments are tensors, plain values, and sequences of either, nested as the op likes.
    """

    name: str
    reference: Callable
    contract: Contract
    cases: Callable[[], list[Case]]
    bench_cases: Callable[[], list[Case]]
    cost: Callable[..., Cost]
    dtype_of: str  # the argument whose dtype is the compute dtype; of a sequence, its first matrix's
    signature: inspect.Signature = field(repr=False)
    shapes: Callable | None = None  # the outputs' shapes and dtypes for torch.compile; None: they follow from values
    unpack: Callable = _alone  # the list of the outputs that are not None -> the outputs

    def __call__(self, *args, backend: str | None = None, **kwargs):
        if torch.compiler.is_compiling():
            return self._in_graph(*args, backend=backend, **kwargs)
        return self.run(*args, backend=backend, **kwargs)

    def run(self, *args, backend: str | None = None, **kwargs):
        arguments = self.bind(args, kwargs)
        kernel, request = self._chosen(arguments, backend)
        values = tuple(arguments.values())
        return run_with_gradients(self, kernel, values) if request.grad else kernel.forward(*values)

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, in the signature's order; TypeError as for any function. Faster than `signature`."""
        defaults, given = self._defaults, len(args)
        if given == len(defaults) and not kwargs:
            return dict(zip(defaults, args, strict=True))
        arguments = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        required, taken = self._needs[min(given, len(defaults))]
        wrong = not kwargs.keys() >= required or not kwargs.keys().isdisjoint(taken)
        if wrong or given > len(defaults) or len(arguments) > len(defaults):
            self.signature.bind(*args, **kwargs)  # raises
        return arguments

    @functools.cached_property
    def _defaults(self) -> dict[str, Any]:
        return {name: parameter.default for name, parameter in self.signature.parameters.items()}

    @functools.cached_property
    def _needs(self) -> list[tuple[set[str], set[str]]]:
        """By the number of arguments given by position: the names that are needed beside them, and those given."""
        names, empty = list(self._defaults), inspect.Parameter.empty
        return [
            ({name for name in names[given:] if self._defaults[name] is empty}, set(names[:given]))
            for given in range(len(names) + 1)
        ]

    def check(self, **arguments) -> list[torch.Tensor]:
        """All tensors among the arguments. Raises ValueError for what the op cannot be computed of, on any backend."""
        return self.contract.check(self.name, arguments)

    def _chosen(self, arguments: dict[str, Any], backend: str | None) -> tuple[Kernel, Request]:
        """The kernel for arguments that are right, and the request it was chosen for."""
        tensors = self.contract.check(self.name, arguments)
        request = self.request(arguments, tensors)
        if (reason := opaque.why(tensors)) is None:
            return select(self.name, request, backend), request
        require_backend(backend)
        *others, reference = kernels(self.name)
        if any(kernel.backend == backend for kernel in others):
            raise BackendError(f"{self.name} cannot run on backend {backend!r} here: {reason}")
        return reference, request

    def _in_graph(self, *args, **kwargs):
        """While torch.compile traces: a call of the op's operator, or a break of the graph; see `graph`."""
        if self.shapes is None:
            return torch.compiler.disable(self.run)(*args, **kwargs)
        return self.unpack(getattr(torch.ops.esm_fast, self.name)(*args, **kwargs))

    def request(self, arguments: dict[str, Any], tensors: Sequence[torch.Tensor] | None = None) -> Request:
        """tensors: all that are among the arguments, where they are known."""
        lead = arguments[self.dtype_of]
        if not isinstance(lead, torch.Tensor):
            lead = next(tensor for tensor in _tensors(lead[0]) if tensor.ndim > 1)
        grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors or _tensors(arguments))
        return request_of(lead.device, dtype=lead.dtype, head_dim=_head_dim(arguments), grad=grad)


def _tensors(tree) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _head_dim(arguments: dict[str, Any]) -> int | None:
    if "heads" in arguments:
        return arguments["x"].shape[-1] // arguments["heads"]
    return arguments["q"].shape[-1] if "q" in arguments else None


_OF_THE_REFERENCE = object()


def op(*, contract, cases, cost, dtype_of, bench_cases=None, shapes=_OF_THE_REFERENCE, unpack=_alone):
    """Decorates a reference: its name and signature become the op's, its annotations (int, float, bool) tell the
    arguments that are no tensors."""

    def decorate(reference: Callable) -> Op:
        name = reference.__name__
        signature = inspect.signature(reference)
        known = reference if shapes is _OF_THE_REFERENCE else shapes
        OPS[name] = Op(name, reference, contract, cases, bench_cases or cases, cost, dtype_of, signature, known, unpack)
        _KERNELS[name] = [Kernel(name, REFERENCE, reference, priority=priority_of(REFERENCE), differentiable=reference)]
        return OPS[name]

    return decorate


def implements(op_name: str, *, backend: str, why_not, **options):
    """Decorates a kernel in `kernels/<backend>`: it takes exactly the arguments of the op's reference, by position.
    options: other fields of `Kernel`."""

    def decorate(forward: Callable) -> Callable:
        options.setdefault("priority", priority_of(backend))
        _KERNELS[op_name].append(Kernel(op_name, backend, forward, why_not=why_not, **options))
        _KERNELS[op_name].sort(key=lambda kernel: -kernel.priority)
        return forward

    return decorate


_STACKS: dict[str, Callable] = {}


def stacks(backend: str) -> Callable[[Callable], Callable]:
    """Decorates what runs a backend's halves of all layers, one after the other, with the bits that they have alone.

    stack(x, cu_seqlens, max_seqlen, layers, heads, rotary, kept) yields the stream after each layer, each of which may
    be overwritten once the next is asked for, but not those after layers in `kept`, nor the last.
    """

    def decorate(stack: Callable) -> Callable:
        _STACKS[backend] = stack
        return stack

    return decorate


def stack_of(*halves: Kernel) -> Callable | None:
    """What runs these together; None where they are of several backends, or theirs has nothing for it."""
    backend, *others = {kernel.backend for kernel in halves}
    return None if others else _STACKS.get(backend)


@functools.cache
def backends() -> dict[str, str | None]:
    """Every backend's name -> None, or why its library could not be imported. Importing it registers its kernels.

    Raises ImportError where the package itself is broken: that is no reason to compute by something else.
    """
    import esm_fast.kernels as package

    found: dict[str, str | None] = {}
    for module in pkgutil.iter_modules(package.__path__):
        try:
            importlib.import_module(f"{package.__name__}.{module.name}")
            found[module.name] = None
        except ImportError as error:
            if (error.name or "").startswith(package.__name__.partition(".")[0]):
                raise
            found[module.name] = str(error)
    return found | {REFERENCE: None}


def kernels(op_name: str) -> list[Kernel]:
    """The kernels of an op, best first; the reference is last."""
    backends()
    return list(_KERNELS[op_name])


def require_backend(name: str | None) -> None:
    """Raises ValueError for a name that is no backend, BackendError for one whose module cannot be imported."""
    if name is None:
        return
    known = backends()
    if name not in known:
        raise ValueError(f"there is no backend {name!r}; choose one of {', '.join(sorted(known))}")
    if known[name] is not None:
        raise BackendError(f"backend {name!r} cannot be loaded: {known[name]}")


_EXECUTORS: list[Callable[[], Any]] = []


def runs_on(executor: Callable[[], Any]) -> Callable[[], Any]:
    """Decorates what says, for a backend, where its kernels run just now: None, or what stands in the device's place,
    such as an emulator. It is part of every request, so no choice outlives it."""
    _EXECUTORS.append(executor)
    return executor


@functools.cache
def _gpu(device: torch.device) -> tuple[tuple[int, int], str]:
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)


def request_of(device: torch.device, *, dtype: torch.dtype, head_dim: int | None = None, grad: bool = False) -> Request:
    """The request of a call on this machine."""
    kind, arch, name = device.type, None, None  # asked once: torch makes a string of it each time
    if kind == "cuda":
        device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        arch, name = _gpu(device)
    return Request(kind, arch, dtype, head_dim, grad, _C.isa(), name, _executors())


def _executors() -> tuple:
    backends()  # which say what they run on
    return tuple([find() for find in _EXECUTORS])


def _complete(request: Request) -> Request:
    return request._replace(level=request.level or _C.isa(), executors=request.executors or _executors())


def select(op_name: str, request: Request, backend: str | None = None) -> Kernel:
    """The kernel to run. A backend asked for by name runs the ops it implements, or raises BackendError with its
    reasons; the ops it does not implement at all are selected as if no backend had been named."""
    if not request.executors:
        request = _complete(request)
    candidates, first = tuple(_KERNELS[op_name]), None if backend else verdicts.preferred(op_name, request)
    kernel = _first(candidates, request, first, verdicts.holds()) if first else None
    return kernel or _chosen(op_name, candidates, request, backend)


def require_choices(choices: str, backend: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raises BackendError where choices that `verdicts` gave, or a backend that was named, cannot run on a device."""
    with verdicts.held(choices):
        for key in verdicts.keys_of(choices):
            head_dim, of = key.head_dim or None, getattr(torch, key.dtype)
            select(key.op, request_of(device, dtype=of, head_dim=head_dim, grad=key.grad))
        if backend:
            select("gelu_ffn", request_of(device, dtype=dtype), backend)
            select("attention_varlen", request_of(device, dtype=dtype), backend)


@functools.lru_cache(maxsize=1024)
def _first(candidates: tuple[Kernel, ...], request: Request, backend: str, held: bool) -> Kernel | None:
    """The kernel that verdicts prefer. Raises BackendError where it cannot run what was begun with it."""
    kernel = next((kernel for kernel in candidates if kernel.backend == backend), None)
    reasons = kernel.why_not(request) if kernel else ["there is no such backend"]
    if reasons and held:
        raise BackendError(
            f"{candidates[0].op} was begun on backend {backend!r}, which cannot run here: {'; '.join(reasons)}"
        )
    return None if reasons else kernel


# By all that a choice depends on, the kernels included: it never has to be told that something changed.
@functools.lru_cache(maxsize=1024)
def _chosen(op_name: str, candidates: tuple[Kernel, ...], request: Request, backend: str | None) -> Kernel:
    require_backend(backend)
    named = [kernel for kernel in candidates if kernel.backend == backend]
    for kernel in named or candidates:
        reasons = kernel.why_not(request) or ([] if named else kernel.yields(request))
        if not reasons:
            return kernel
        if named:
            raise BackendError(f"{op_name} cannot run on backend {backend!r} here: {'; '.join(reasons)}")
    raise AssertionError("the reference kernel never declines")


def explain(op_name: str, request: Request) -> list[tuple[str, list[str]]]:
    """(backend, reasons it is not chosen for this request) for every kernel of an op, best first."""
    request = _complete(request)
    first, known = verdicts.preferred(op_name, request), kernels(op_name)
    if first not in [kernel.backend for kernel in known if not kernel.why_not(request)]:
        return [(kernel.backend, kernel.why_not(request) or kernel.yields(request)) for kernel in known]
    found = []
    for kernel in sorted(known, key=lambda kernel: kernel.backend != first):
        yields = [verdicts.said(op_name, request, kernel.backend) or f"yields to {first}, which was qualified here"]
        found.append((kernel.backend, kernel.why_not(request) or yields * (kernel.backend != first)))
    return found
