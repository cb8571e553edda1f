"""The plan and the packed batches against their Python definitions, and the thread pool underneath."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esm_fast import _C, ops
from esm_fast.alphabet import CLS, EOS, PAD
from esm_fast.sequences.batching import pack, pack_padded, plan, plan_definition

budgets = st.integers(1, 60)
lengths_lists = st.lists(st.integers(0, 40), max_size=40)
padded_tokens = st.tuples(st.integers(0, 4), st.integers(0, 6)).flatmap(
    lambda shape: st.lists(st.integers(0, 4), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
        lambda ids: torch.tensor(ids, dtype=torch.int64).view(shape)
    )
)


def pack_definition(ids, starts, lengths, order):
    tokens, positions, ends = [], [], [0]
    for s in order:
        sequence = [CLS, *ids[starts[s] : starts[s] + lengths[s]], EOS]
        tokens += sequence
        positions += range(2, 2 + len(sequence))
        ends.append(len(tokens))
    return tokens, positions, ends


def assert_packs(ids, starts, lengths, order):
    batch = pack(ids, starts, lengths, order)
    tokens, positions, ends = pack_definition(ids.tolist(), starts.tolist(), lengths.tolist(), order.tolist())
    assert batch.tokens.tolist() == tokens and batch.tokens.dtype == torch.int32
    assert batch.positions.tolist() == positions and batch.positions.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == ends and batch.cu_seqlens.dtype == torch.int32
    assert batch.order.tolist() == order.tolist() and batch.order.dtype == torch.int64
    assert batch.lengths.tolist() == [lengths[s] + 2 for s in order]
    assert batch.max_seqlen == max(batch.lengths.tolist(), default=0)
    assert len(batch) == len(order)


@given(lengths_lists, budgets)
def test_plan(lengths, budget):
    batches = plan(lengths, budget)
    expected = plan_definition(lengths, budget)
    assert [b.tolist() for b in batches] == [b.tolist() for b in expected]
    assert all(b.dtype == np.int64 for b in batches)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
    flat = [(-lengths[i], i) for b in batches for i in b]
    assert flat == sorted(flat)


@pytest.mark.parametrize(
    "lengths, budget, error",
    [([3, -1], 10, "lengths\\[1\\]"), ([3], 0, "batch_tokens"), ([[3]], 10, "flat"), ([3.5], 10, "whole")],
)
def test_plan_mistakes(lengths, budget, error):
    with pytest.raises((ValueError, TypeError), match=error):
        plan(lengths, budget)


@given(st.data())
def test_pack(data):
    ids = np.array(data.draw(st.lists(st.integers(0, 32), max_size=30)), dtype=np.uint8)
    starts = np.array(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)), dtype=np.int64)
    lengths = np.array([data.draw(st.integers(0, len(ids) - s)) for s in starts], dtype=np.int64)
    order = np.array(data.draw(st.permutations(range(len(starts)))), dtype=np.int64)
    assert_packs(ids, starts, lengths, order[: data.draw(st.integers(0, len(order)))])


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_pack_takes_any_integers_and_strides(dtype):
    ids = np.arange(4, 24, dtype=np.uint8)[::2]
    assert_packs(ids, np.array([0, 2, 5], dtype), np.array([2, 3, 5], dtype), np.array([2, 0], dtype))


@pytest.mark.parametrize(
    "start, length, order", [(-1, 2, 0), (0, 11, 0), (11, 0, 0), (5, 2**62, 0), (0, -1, 0), (0, 1, 1), (0, 1, -1)]
)
def test_pack_stays_inside(start, length, order):
    ids = np.zeros(10, np.uint8)
    with pytest.raises(IndexError):
        pack(ids, np.array([start]), np.array([length]), np.array([order]))


def test_pack_holds_no_more_than_int32_can_count():
    ids = np.zeros(1 << 20, np.uint8)
    with pytest.raises(IndexError, match="2\\^31"):
        pack(ids, np.array([0]), np.array([1 << 20]), np.zeros(2048, np.int64))


def test_pack_mistakes():
    flat = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="ids has 2"):
        pack(np.zeros((2, 2), np.uint8), flat, flat, flat)
    with pytest.raises(ValueError, match="differ"):
        pack(np.zeros(2, np.uint8), flat, np.zeros(2, np.int64), flat)


def test_batch_moves():
    batch = pack(np.array([5, 6, 7], np.uint8), np.array([0]), np.array([3]), np.array([0]))
    moved = batch.to("meta")
    assert {moved.tokens.device.type, moved.positions.device.type, moved.cu_seqlens.device.type} == {"meta"}
    assert moved.max_seqlen == batch.max_seqlen == 5


@given(padded_tokens)
def test_pack_padded(tokens):
    batch, rows = pack_padded(tokens)
    kept = tokens != PAD
    assert batch.tokens.tolist() == tokens[kept].tolist()
    assert rows.tolist() == kept.flatten().nonzero().flatten().tolist()
    assert batch.lengths.tolist() == kept.sum(1).tolist()
    assert batch.max_seqlen == max(batch.lengths.tolist(), default=0)
    assert batch.order.tolist() == list(range(len(tokens)))


@given(padded_tokens, st.randoms(use_true_random=False))
def test_pack_padded_keeps_what_it_is_told(tokens, random):
    keep = torch.tensor([random.random() < 0.6 for _ in range(tokens.numel())], dtype=torch.bool).view(tokens.shape)
    batch, rows = pack_padded(tokens, keep)
    positions = (tokens.ne(PAD).cumsum(1) * tokens.ne(PAD) + 1)[keep]
    assert batch.tokens.tolist() == tokens[keep].tolist()
    assert batch.positions.tolist() == positions.tolist()
    assert batch.lengths.tolist() == keep.sum(1).tolist()
    assert tokens.flatten()[rows].tolist() == batch.tokens.tolist()


@given(padded_tokens.filter(lambda tokens: tokens.numel() > 0))
def test_positions_are_the_peers(tokens):
    modules = pytest.importorskip("esm.modules", reason="fair-esm is not installed")
    table = modules.LearnedPositionalEmbedding(10, 1, PAD)  # row i of the table is the number i
    table.weight.data.copy_(torch.arange(12.0)[:, None])
    batch, rows = pack_padded(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert batch.positions.tolist() == table(tokens).flatten().tolist()


def test_rows_are_where_the_tokens_stood():
    tokens = torch.tensor([[0, 5, 2, 1], [0, 2, 1, 1]])
    batch, rows = pack_padded(tokens)
    assert ops.pack_rows(tokens.view(-1, 1), rows).flatten().equal(batch.tokens.long())
    padded = ops.unpack_rows(batch.tokens[:, None], rows, tokens.numel())
    assert padded.view(tokens.shape).equal(tokens.int() * (tokens != PAD))


def test_pack_padded_mistakes():
    with pytest.raises(ValueError, match="tokens"):
        pack_padded(torch.zeros(3))
    with pytest.raises(ValueError, match="keep"):
        pack_padded(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool))


# ---- the thread pool


@pytest.fixture
def threads():
    before = _C.threads()
    yield _C.set_threads
    _C.set_threads(before)


def large():
    """Work of several pieces."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 3000, 400)
    starts = np.cumsum([0, *lengths[:-1]])
    return rng.integers(4, 30, int(lengths.sum())).astype(np.uint8), starts, lengths, rng.permutation(400)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_threads_change_nothing(threads, count):
    threads(count)
    assert _C.threads() == count
    assert_packs(*large())


def test_threads_are_set_by_numbers_above_zero(threads):
    for count in (0, -1, 5000):
        with pytest.raises(ValueError):
            threads(count)


def test_many_callers_share_the_pool(threads):
    threads(3)
    work = large()
    expected = pack(*work).tokens
    with ThreadPoolExecutor(4) as pool:
        for batch in pool.map(lambda _: pack(*work), range(40)):
            assert batch.tokens.equal(expected)


FORK = """
import os
import signal
import numpy as np
from esm_fast import _C, ops
from esm_fast.sequences.batching import pack
_C.set_threads(3)
n = 400_000
work = np.full(n, 5, np.uint8), np.arange(0, n, 100), np.full(n // 100, 100), np.arange(n // 100)
expected = pack(*work).tokens  # starts the threads, which the child will not have
child = os.fork()
if child == 0:
    signal.alarm(20)
    same = _C.threads() == 3 and pack(*work).tokens.equal(expected)
    _C.set_threads(2)  # would wait for ever for the parent's threads
    os._exit(0 if same and pack(*work).tokens.equal(expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert pack(*work).tokens.equal(expected)
"""


def test_pool_survives_a_fork():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value, printed", [("7", "7"), ("0", "ESM_FAST_THREADS is '0'"), ("many", "is 'many'")])
def test_thread_count_comes_from_the_environment(monkeypatch, value, printed):
    monkeypatch.setenv("ESM_FAST_THREADS", value)
    script = "from esm_fast import _C; print(_C.threads())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert printed in done.stdout + done.stderr
