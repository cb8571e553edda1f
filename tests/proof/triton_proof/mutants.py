"""Faults to plant in the kernels that ship: one line of their source is another one, and the check must see it."""

import importlib.util
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from esm_fast.kernels import triton as shipped
from esm_fast.kernels.triton import common
from triton_proof import sanitizer, source

BOUNDS = (sanitizer.OutOfBounds, "outside every tensor")
RACE = (sanitizer.Race, "another program")
NUMBERS = (AssertionError, "beyond tolerance")
NEIGHBOURS = (AssertionError, "depends on its neighbours")


class Mutant(NamedTuple):
    """module: a file of kernels; right: a piece of one of its lines, and wrong: what stands there instead.

    op, case, direction: what shows it. caught: the exception of the check that is there for it, and what that says.
    """

    module: str
    fault: str
    right: str
    wrong: str
    op: str
    case: str
    direction: str
    caught: tuple[type[BaseException], str]


def _mutants(module: str, op: str, *rows: tuple) -> list[Mutant]:
    return [Mutant(module, fault, right, wrong, op, *shown) for fault, right, wrong, *shown in rows]


_LOADED = "P + offsets, mask=exist, other=0.0"
MUTANTS = [
    *_mutants(
        "attention_varlen", "attention_varlen",
        ("dropped mask", _LOADED, "P + offsets", "tiny", "fwd", BOUNDS),
        ("missing other", _LOADED, "P + offsets, mask=exist", "tiny", "fwd", NUMBERS),
        ("wrong stride", "* (HEADS * HEAD_DIM) + col", "* (HEADS * HEAD_DIM + 1) + col", "tiny", "fwd", RACE),
        ("cu_seqlens off by one", "sequence + 1) - start", "sequence + 1) - start + 1", "tiny", "fwd", RACE),
        ("overlapping tiles", "% tiles * TILE", "% tiles * (TILE - 1)", "tile_edges", "fwd", RACE),
        ("keys beyond the end", "keys[None, :] < length", "keys[None, :] >= 0", "tiny", "fwd", NUMBERS),
        ("neighbours times 0", "_load(V + base, keys, length", "_load(V + base, keys, n - start", "tile_edges", "fwd",
         NEIGHBOURS),
        ("missing scale", "dq * scale", "dq", "tiny", "bwd", NUMBERS),
        ("wrong delta", "out * grad", "grad * grad", "tiny", "bwd", NUMBERS),
        ("one delta for all heads", "DELTA + head.to(tl.int64) * n + rows", "DELTA + rows", "tiny", "bwd", RACE),
    ),
    *_mutants(
        "common", "gelu_ffn",
        ("another GELU", "(1.0 + tl.erf(x * 0.70", "(1.0 + tl.erf(x * 0.71", "odd_hidden", "fwd", NUMBERS),
        ("wrong slope", "tl.exp(-0.5 * x * x)", "tl.exp(-x * x)", "odd_hidden", "bwd", NUMBERS),
    ),
    *_mutants(
        "contact_map", "contact_map",
        ("both mirror images", "(left < top) | (left >= length)", "left >= length", "tile_edges", "fwd", RACE),
        ("not transposed", "there + tl.trans(back)", "there + back", "empty_between", "fwd", NUMBERS),
        ("sums of <cls>", "total * kept", "total", "tiny", "fwd", NUMBERS),
    ),
    *_mutants(
        "contact_tiles", "contact_map", ("another base", "(scale * _LOG2E)", "scale", "empty_between", "fwd", NUMBERS)
    ),
    *_mutants(
        "contact_map_backward", "contact_map",
        ("no delta", "dq = tl.dot((p * (dp - delta[:, None])", "dq = tl.dot((p * (dp)", "empty_between", "bwd",
         NUMBERS),
        ("one way", "return there + back, kept", "return there, kept", "empty_between", "bwd", NUMBERS),
    ),
    *_mutants(
        "embedding", "embedding",
        ("<mask> is seen", "_MASK, 0.0, scale", "_MASK, scale, scale", "primes", "fwd", NUMBERS),
        ("factors beyond", "0.0, scale), mask=row < end", "0.0, scale)", "one_token", "fwd", BOUNDS),
    ),
    *_mutants(
        "gather", "embedding",
        ("two groups' rows", "ENDS + group + 1", "ENDS + group + 2", "tiny", "bwd", BOUNDS),
        ("missing scale", "x *= tl.load(SCALE", "x += 0.0 * tl.load(SCALE", "tiny", "bwd", NUMBERS),
    ),
    *_mutants("gelu_ffn", "gelu_ffn", ("no slope", "grad * slope", "grad", "odd_hidden", "bwd", NUMBERS)),
    *_mutants(
        "layer_norm", "gelu_ffn",
        ("wrong mean", "tl.sum(x, 1)[:, None] / WIDTH", "tl.sum(x, 1)[:, None] / n", "prime_rows", "fwd", NUMBERS),
        ("one share for all", "share = tl.program_id(0) * WIDTH +", "share =", "rows_33", "bwd", RACE),
    ),
    *_mutants(
        "linear", "gelu_ffn",
        ("dropped mask", "w_at, mask=first + k[:, None] < K, other=0.0", "w_at", "odd_hidden", "fwd", BOUNDS),
        ("a row beyond the end", "m - 1 - row", "m - row", "one_row", "fwd", BOUNDS),
        ("missing bias", "tile + tl.load", "tile + 0.0 * tl.load", "odd_hidden", "fwd", NUMBERS),
    ),
    *_mutants(
        "masked_lm_head", "masked_lm_head",
        ("missing target", "lse - right", "lse", "masked_rows", "fwd", NUMBERS),
        ("the first rows", "rows = tl.load(CHOSEN + rows)", "rows += 0", "masked_rows", "fwd", NUMBERS),
    ),
    *_mutants(
        "masked_softmax", "masked_softmax",
        ("padding is a key", "row % t < length, length, 0", "row % t < length, t, 0", "ragged", "fwd", NUMBERS),
        ("no inner product", "out * (grad - inner)", "out * grad", "ragged", "bwd", NUMBERS),
    ),
    *_mutants(
        "pack_rows", "unpack_rows",
        ("a wrong half", "tl.where(before, middle + 1, low)", "tl.where(before, middle, low)", "gaps", "fwd", NUMBERS),
        ("padding is left", "row < size, WIDTH", "chosen, WIDTH", "ragged", "fwd", NUMBERS),
        ("rows beyond the end", "place < n, place < n", "place < n, place <= n", "gaps", "bwd", BOUNDS),
    ),
    *_mutants(
        "pool", "pool",
        ("rows of weight 0", "(weight != 0.0)[:, None]", "(row < end)[:, None]", "primes", "fwd", NUMBERS),
        ("a row beyond the end", "WEIGHT + row, mask=row < end", "WEIGHT + row, mask=row <= end", "one_token", "fwd",
         BOUNDS),
    ),
    *_mutants(
        "pre_ln_attention", "pre_ln_attention",
        ("q, k and v in one place", "which.to(tl.int64) * m * WIDTH", "0", "tiny", "fwd", RACE),
    ),
    *_mutants(
        "rotary", "pre_ln_attention", ("turned back", "- second * sin1,", "+ second * sin1,", "rotary", "fwd", NUMBERS)
    ),
]  # fmt: skip


@contextmanager
def planted(mutant: Mutant, folder: Path):
    """Within it, every function of the mutant's file is the mutated one, whoever calls it."""
    original = importlib.import_module(f"{shipped.__name__}.{mutant.module}")
    mutated = _load(mutant, folder)
    functions = {
        name: value
        for name, value in vars(original).items()
        if callable(value) and getattr(value, "fn", value).__module__ == original.__name__
    }
    with ExitStack() as stack:
        for module in {common, original, *shipped.MODULES}:
            for name, function in functions.items():
                if vars(module).get(name) is function:
                    stack.enter_context(mock.patch.object(module, name, getattr(mutated, name)))
        yield


def _load(mutant: Mutant, folder: Path):
    """The mutant's file as a module beside the original, which registers nothing."""
    text = (source.KERNELS / f"{mutant.module}.py").read_text()
    assert mutant.right in text, f"{mutant.module}.py has no {mutant.right!r}"
    path = folder / f"{mutant.module}.py"
    path.write_text(text.replace(mutant.right, mutant.wrong, 1))
    spec = importlib.util.spec_from_file_location(f"{shipped.__name__}.mutant", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(common, "implements", lambda *_, **__: lambda function: function):
        spec.loader.exec_module(module)
    return module
