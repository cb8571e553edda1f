"""Ops with hostile arguments, in child processes: no call crashes, none is computed of what is not there, and what a
kernel does compute is what the reference computes of the same arguments.

HOSTILE_CALLS in the environment makes it run longer: docs/reliability.md has the figures of a long run.
"""

import collections
import os
import random
from functools import partial

import pytest
import torch
from hostile import attempts, stand_ins

from esm_fast.ops import OPS, LayerWeights, verify
from esm_fast.ops.registry import REFERENCE

CALLS = int(os.environ.get("HOSTILE_CALLS", 3000))
EXPECTED = {"ValueError", "TypeError", "IndexError", "RuntimeError", "BackendError", "NotImplementedError"}
EXTREME = {"nan", "infinite", "huge", "3", "33", "2**31", "2**62"}  # where rounding or overflow decides
SMALL = [(op, case) for op in OPS.values() for case in op.cases() if case.name not in ("wide", "long", "primes")]


def drawn(seed: int):
    """(name, arguments, backend, whether gradients are asked for, whether results can be compared)."""
    rng = random.Random(seed)
    op, case = rng.choice(SMALL)
    arguments = case.build(rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64]), "cpu", seed)
    backend, grad, changes = rng.choice([None, "cpu", REFERENCE]), rng.random() < 0.3, []
    arguments = op.bind((), arguments)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(list(arguments))
        holder, key = arguments, name
        if name == "layers" and isinstance(arguments[name], list) and rng.random() < 0.9:
            holder, at = arguments[name], rng.randrange(len(arguments[name]))
            if isinstance(holder[at], LayerWeights):
                field = rng.choice(LayerWeights._fields)
                kind, make = rng.choice(list(stand_ins(getattr(holder[at], field), rng).items()))
                changes.append((f"layers[{at}].{field}", kind, partial(_replace, holder, at, field, make)))
                continue
        kind, make = rng.choice(list(stand_ins(holder[key], rng).items()))
        changes.append((name, kind, partial(_put, holder, key, make)))
    text = ", ".join(f"{name}: {kind}" for name, kind, _ in changes)
    return f"{seed} {op.name} {case.name} {backend} {'grad ' * grad}{text}", op, arguments, backend, grad, changes


def _put(holder, key, make):
    holder[key] = make()


def _replace(holder, at, field, make):
    holder[at] = holder[at]._replace(**{field: make()})


def attempt(seed: int) -> str:
    _, op, arguments, backend, grad, changes = drawn(seed)
    for *_, change in changes:
        try:
            change()
        except (RuntimeError, TypeError, NotImplementedError, ValueError, IndexError):
            return "no such stand-in"
    if grad:
        arguments = {n: _with_gradient(v) for n, v in arguments.items()}
    with torch.set_grad_enabled(grad):
        got = _results(op(**arguments, backend=backend), grad)
        if backend == REFERENCE or EXTREME & {kind for _, kind, _ in changes}:
            return "returned"
        wanted = _results(op(**arguments, backend=REFERENCE), grad)
    try:
        for ours, reference in zip(got, wanted, strict=True):
            _require_same(ours, reference)
    except AssertionError:
        _require_as_right(op, arguments, got, wanted)
        return "as right"
    return "same"


def _require_as_right(op, arguments, got, wanted) -> None:
    """Numbers such as tables of cosines up to 40 make any rounding large: then the rule of `verify` decides. It has
    something to go by only where the reference's own error is finite, and as large as the difference that was met."""
    assert all(leaf.isfinite().all() for leaf in wanted)
    with torch.no_grad():
        truth = _results(op.reference(**verify.widened(verify.bound(op, arguments))), False)
    names = [f"output {i}" for i in range(len(got))]
    dtypes = {leaf.dtype for _, leaf in verify.named_leaves(arguments) if verify.differentiable(leaf)}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    assert all(check.ok for check in verify.compare(names, got, wanted, truth, coarsest, 2.0))


def _with_gradient(value):
    plain = type(value) is torch.Tensor and value.is_floating_point() and value.layout is torch.strided
    return value.detach().requires_grad_() if plain and not value.is_neg() else value


def _results(outputs, grad: bool) -> list[torch.Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [out for out in outputs if out is not None]
    if grad and any(out.requires_grad for out in outputs):
        sum(out.float().sum() for out in outputs if out.requires_grad).backward()
    return [out.detach() for out in outputs]


def _require_same(ours: torch.Tensor, reference: torch.Tensor) -> None:
    assert ours.shape == reference.shape and ours.dtype == reference.dtype, (ours.shape, ours.dtype, reference.dtype)
    assert ours.device == reference.device
    if ours.device.type == "meta" or not ours.numel():
        return
    ours, reference = ours.double(), reference.double()
    scale = reference.nan_to_num(0, 0, 0).abs().max().clamp_min(1e-3)
    torch.testing.assert_close(ours / scale, reference / scale, rtol=0, atol=3e-2, equal_nan=True)


def test_no_hostile_call_crashes_or_is_computed_otherwise():
    seeds = range(CALLS)
    seen, bad = collections.Counter(), []
    for outcome in attempts([(str(seed), partial(attempt, seed)) for seed in seeds]):
        kind = outcome.returned or ("crash" if outcome.crash else outcome.error[0])
        seen[kind] += 1
        if outcome.crash or (outcome.error and outcome.error[0] not in EXPECTED):
            bad.append((drawn(int(outcome.name))[0], outcome))
    assert not bad, f"{len(bad)} of {CALLS}, {seen}: " + "\n".join(map(str, bad[:20]))
    assert seen["as right"] < max(2, CALLS / 200), seen  # an exception, not another rule for all
    assert seen["ValueError"] > CALLS / 4 and seen["same"] + seen["returned"] > CALLS / 20, seen  # both sides were seen
    print(dict(seen))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_argument_is_in_the_contract(op):
    assert list(op.contract.specs) == [name for name in op.signature.parameters if name in op.contract.specs]
    between = {"return_layers"}  # which the whole of the arguments decides
    assert op.signature.parameters.keys() - op.contract.specs.keys() <= between


@pytest.mark.parametrize(("name", "backend"), [(name, b) for name in OPS for b in ("cpu", REFERENCE)])
def test_values_are_looked_at_before_a_kernel_reads_by_them(name, backend):
    """Offsets and indices that lead outside: the contract says so, whichever backend would run."""
    op = OPS[name]
    case = next(case for other, case in SMALL if other is op)
    for argument in op.contract._inside:
        for number in (-7, 2**30):
            arguments = case.build(torch.float32, "cpu", 0)
            value = arguments[argument]
            if not isinstance(value, torch.Tensor) or value.is_floating_point() or not value.numel():
                continue
            arguments[argument] = value.clone().index_fill_(0, torch.tensor([0]), number)
            with pytest.raises((ValueError, IndexError), match=rf"{name}.*{argument} must"):
                op(**arguments, backend=backend)
