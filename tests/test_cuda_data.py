"""The CUDA data path, executed by the emulator: bit for bit what the CPU computes."""

import math

import numpy as np
import pytest
import torch
from esm_fast.kernels.cuda import data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esm_fast import _C, packing
from esm_fast.alphabet import MASK

pytestmark = pytest.mark.usefixtures("emulated")

STANDARD = b"LAGVSERTIDPKQNFYMHWC"
SPECIAL = [b"<CLS>", b"<EOS>", b"<UNK>", b"<NULL_1>", b"<MASK>", b"<PAD>", b"<MASK", b"<<MASK>", b"*", b"\0", b" "]


def tokenize_both(records: list[bytes]):
    """Checks the GPU's ids and checks of these records against the CPU's; returns the GPU's."""
    residues = np.frombuffer(b"".join(records), dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, records)], dtype=np.int64)
    ids, ends, unknown, first, stops = _C.encode_records(residues, offsets)
    got = data.tokenize(torch.from_numpy(residues.copy()), torch.from_numpy(offsets))
    assert got.counts.tolist() == np.diff(ends).tolist()
    spans = zip(got.starts.tolist(), got.counts.tolist(), strict=True)
    assert [got.ids[start : start + count].tolist() for start, count in spans] == [
        ids[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)
    ]
    for mine, theirs in ((got.unknown, unknown), (got.first_unknown, first), (got.stops, stops)):
        assert mine.tolist() == theirs.tolist()
    bad = np.flatnonzero(unknown)
    assert got.worst == (int(bad[0]) << 32 | int(first[bad[0]]) if len(bad) else 2**63 - 1)
    return got


def test_every_byte():
    tokenize_both([bytes([byte]) for byte in range(256)])
    tokenize_both([b"MKV" + bytes([byte]) * 2 + b"A" for byte in range(256)] + [bytes(range(256))])


def test_plain_records_take_one_pass():
    assert (tokenize_both([b"MKTAYIAKQR" * 9, STANDARD, b"", b"AXBZUO.-"]).unknown == 0).all()


def test_special_tokens_and_stops():
    tokenize_both([piece * n + tail for piece in SPECIAL for n in (1, 9) for tail in (b"", b"A", b"*", b"<MASK>*")])
    tokenize_both([b"A" * n + b"<MASK>" + b"*" for n in range(26, 34)])  # across the warp's steps


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.sampled_from([STANDARD, *SPECIAL]) | st.binary(max_size=40)).map(b"".join), max_size=8))
def test_any_records(records):
    tokenize_both(records)


@pytest.mark.parametrize("lengths", [[1], [0, 3, 0, 5, 0], [30, 31, 62, 1, 2], [0, 0]])
def test_packing_equals_the_cpu_s(lengths):
    generator = np.random.default_rng(0)
    ids = generator.integers(4, 24, sum(lengths) + 5, dtype=np.uint8)
    starts = np.cumsum([5, *lengths[:-1]], dtype=np.int64)
    order = generator.permutation(len(lengths))
    batch = packing.pack(ids, starts, np.array(lengths), order)
    tensors = (torch.from_numpy(array) for array in (ids, starts, order))
    tokens, positions = data.pack_tokens(*tensors, batch.cu_seqlens, len(batch.tokens))
    assert torch.equal(tokens, batch.tokens) and torch.equal(positions, batch.positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 8, 64, 1280])
def test_padding_and_back(dtype, width):
    lengths = [3, 0, 1, 7]
    cu_seqlens = torch.tensor([0, 3, 3, 4, 11], dtype=torch.int32)
    packed = torch.randn(11, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    padded = data.pad(packed, cu_seqlens, 8)
    expected = torch.zeros(4, 8, width, dtype=dtype)
    for s, length in enumerate(lengths):
        expected[s, :length] = packed[cu_seqlens[s] : cu_seqlens[s + 1]]
    assert torch.equal(padded, expected)
    assert torch.equal(data.unpad(padded, cu_seqlens, 11), packed)


# --- masking ---------------------------------------------------------------------------------------------------------


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 in numpy, from its paper: (4, n) counters to (4, n) words."""
    c, low = counter.astype(np.uint64), np.uint64(0xFFFFFFFF)
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = np.stack([b >> np.uint64(32) ^ c[1] ^ k[0], b & low, a >> np.uint64(32) ^ c[3] ^ k[1], a & low])
        k = [k[0] + np.uint64(0x9E3779B9) & low, k[1] + np.uint64(0xBB67AE85) & low]
    return c.astype(np.uint32)


def test_philox_gives_its_authors_numbers():
    """Known answers of Random123, the authors' library."""
    zeros, ones = np.zeros((4, 1), np.uint32), np.full((4, 1), 0xFFFFFFFF, np.uint32)
    assert [hex(word) for word in philox(zeros, (0, 0))[:, 0]] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    last = philox(ones, (0xFFFFFFFF, 0xFFFFFFFF))[:, 0]
    assert [hex(word) for word in last] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


def masked(tokens, cu_seqlens, records, epoch, seed):
    """Masking as csrc/masking.h describes it, in numpy."""
    lengths = np.diff(cu_seqlens)
    record = np.repeat(np.asarray(records), lengths).astype(np.uint64)
    position = np.concatenate([np.arange(length) for length in lengths])
    counter = np.stack(
        [position, np.full_like(position, epoch), record & np.uint64(0xFFFFFFFF), record >> np.uint64(32)]
    )
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    asked = (tokens >= 4) & (tokens <= 30) & (words[0] < math.floor(0.15 * 2**32))
    standard = tokens < 24
    other = 4 + (words[2].astype(np.uint64) * np.where(standard, 19, 20).astype(np.uint64) >> np.uint64(32)).astype(int)
    other += standard & (other >= tokens)
    is_mask, is_kept = words[1] < math.floor(0.8 * 2**32), words[1] >= math.floor(0.9 * 2**32)
    shown = np.where(asked & ~is_kept, np.where(is_mask, MASK, other), tokens)
    return shown, np.where(asked, tokens, -100)


@pytest.mark.parametrize("epoch, seed", [(0, 0), (3, 2**63 + 12345)])
def test_masking_is_one_on_gpu_cpu_and_paper(epoch, seed):
    generator = np.random.default_rng(1)
    lengths = [0, 1, 2, 500, 0, 33, 1024, 3]
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    tokens = generator.integers(0, 33, sum(lengths), dtype=np.int32)
    records = np.array([5, 0, 2**40 + 1, 7, 9, 1, 2**32, 3])
    expected = masked(tokens, cu_seqlens, records, epoch, seed)
    on_cpu = _C.mask_tokens(tokens, cu_seqlens, records, epoch, seed)
    on_gpu = data.mask_tokens(*map(torch.from_numpy, (tokens, cu_seqlens, records)), epoch, seed)
    for truth, cpu, gpu in zip(expected, on_cpu, on_gpu, strict=True):
        assert truth.tolist() == cpu.tolist() == gpu.tolist()

    alone = _C.mask_tokens(tokens[3:503], np.array([0, 500], np.int32), records[3:4], epoch, seed)
    assert [part.tolist() for part in alone] == [part[3:503].tolist() for part in on_cpu]


def chi_square(counts, shares) -> float:
    expected = np.asarray(shares) * np.sum(counts)
    return float((np.square(counts - expected) / expected).sum())


def test_masking_statistics():
    """15 %, 80/10/10, and replacements uniform over the other amino acids: chi-square, each at p = 0.001."""
    n = 400_000
    tokens = np.random.default_rng(2).integers(4, 24, n, dtype=np.int32)
    cu_seqlens = np.arange(0, n + 1, 1000, dtype=np.int32)
    shown, targets = _C.mask_tokens(tokens, cu_seqlens, np.arange(n // 1000), 0, 11)
    asked = targets != -100
    assert chi_square(np.array([asked.sum(), (~asked).sum()]), [0.15, 0.85]) < 10.83
    kinds = (
        shown[asked] == MASK,
        (shown[asked] != MASK) & (shown[asked] != tokens[asked]),
        shown[asked] == tokens[asked],
    )
    assert chi_square(np.array([kind.sum() for kind in kinds]), [0.8, 0.1, 0.1]) < 13.82
    steps = (shown[asked] - tokens[asked])[kinds[1]] % 20
    assert chi_square(np.bincount(steps, minlength=20)[1:], np.full(19, 1 / 19)) < 42.31
    assert (shown[~asked] == tokens[~asked]).all()
    again, _ = _C.mask_tokens(tokens, cu_seqlens, np.arange(n // 1000), 1, 11)
    assert (again != shown).mean() > 0.2  # another epoch asks for others
