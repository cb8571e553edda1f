"""The proof machinery itself, in the interpreter: number formats, and that every check catches what it is there for."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton_proof import checks, sanitizer, toy
from triton_proof.numerics import to_tf32
from triton_proof.sanitizer import Fault, OutOfBounds, Race

from esm_fast.ops import verify

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# --- number formats --------------------------------------------------------------------------------------------------


@triton.jit
def arithmetic(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a * b + a - tl.abs(b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_rounds_as_torch_does(dtype):
    x, y = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty_like(x)
    arithmetic[(1,)](x, y, out, 1024)
    torch.testing.assert_close(out, x * y + x - y.abs(), rtol=0, atol=0)


@triton.jit
def cast(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("to", DTYPES)
def test_casts_round_to_nearest_even(source, to):
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1 + 2**-8, 1 + 3 * 2**-8, 65519.0, 65520.0, 1e-7]
    ordinary = torch.randn(1014, generator=torch.Generator().manual_seed(0))
    x = torch.cat([torch.tensor(special), ordinary]).to(source)
    out = torch.empty(1024, dtype=to)
    cast[(1,)](x, out, 1024)
    torch.testing.assert_close(out, x.to(to), rtol=0, atol=0, equal_nan=True)


@triton.jit
def product(a, b, out, PRECISION: tl.constexpr):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    x, y = tl.load(a + i * 16 + j), tl.load(b + i * 16 + j)
    tl.store(out + i * 16 + j, tl.dot(x, y, input_precision=PRECISION))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_multiplies_exactly_and_adds_in_fp32(dtype):
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(16, 16)
    product[(1,)](a, b, out, "ieee")
    torch.testing.assert_close(out, a.float() @ b.float())


def test_tf32_is_seen():
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    exact, rounded = torch.empty(2, 16, 16)
    product[(1,)](a, b, exact, "ieee")
    product[(1,)](a, b, rounded, "tf32")
    assert (rounded - exact).abs().max() > 1e-4
    a, b = (torch.from_numpy(to_tf32(t.numpy())) for t in (a, b))
    torch.testing.assert_close(rounded, a @ b)


@triton.jit
def where_equal(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, 1.0, mask=(i < N) & (tl.load(x) == tl.load(x + 1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_comparison_of_two_numbers_masks_a_block(dtype):
    for pair, expected in (([1.0, 1.0], 1.0), ([1.0, 2.0], 0.0)):
        out = torch.zeros(16)
        where_equal[(1,)](torch.tensor(pair, dtype=dtype), out, 16)
        assert (out == expected).all()


@triton.jit
def too_small(a, out):
    i = tl.arange(0, 4)
    x = tl.load(a + i[:, None] * 4 + i[None, :])
    tl.store(out + i[:, None] * 4 + i[None, :], tl.dot(x, x))


def test_a_dot_that_no_gpu_has_is_refused():
    with pytest.raises(Exception, match="(?s)K >= 16"):
        too_small[(1,)](torch.zeros(4, 4).half(), torch.empty(4, 4))


# --- the right kernel passes everything, each planted fault is caught by the check that is there for it ---------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", toy.cases(), ids=lambda case: case.name)
def test_the_right_kernel_passes(case, dtype):
    check_toy("none", case.name, dtype)


def check_toy(fault, case_name, dtype=torch.float32):
    case = next(case for case in toy.cases() if case.name == case_name)
    found = verify.forward(toy.OP, toy.kernel(fault), verify.guarded(case), dtype, "cpu")
    if not all(check.ok for check in found):
        raise AssertionError(f"tolerance: {found}")
    if case_name != "one_token":
        share = lambda arguments: checks._sequence(arguments, "x")  # noqa: E731
        checks.neighbours_are_left_alone(toy.OP, toy.kernel(fault), case, dtype, share, grad=False)


@pytest.mark.parametrize(
    "fault, raises, match",
    [
        ("dropped mask", OutOfBounds, "times_sum loads an address outside every tensor argument.*toy.py:"),
        ("dropped store mask", Race, "stores to what another program writes.*toy.py:"),
        ("wrong stride", OutOfBounds, "outside every tensor"),
        ("off by one in cu_seqlens", (OutOfBounds, Race, AssertionError), "outside every tensor|another|tolerance"),
        ("no other", AssertionError, "tolerance"),
        ("masked by a product", AssertionError, "depends on its neighbours"),
        ("overlapping tiles", Race, "what another program writes"),
        ("reads another program's result", Race, "another program"),
        ("atomic update", Race, "updates memory atomically"),
        ("unwritten row", AssertionError, "tolerance"),
    ],
)
def test_a_planted_fault_is_caught(fault, raises, match):
    with pytest.raises(raises, match=f"(?s){match}"):
        check_toy(fault, "tile_edges")


def test_a_store_beyond_the_last_sequence():
    with pytest.raises(OutOfBounds, match="stores to an address outside"):
        check_toy("dropped store mask", "one_token")


def test_an_off_by_one_between_sequences_is_a_wrong_number():
    """All rows stay inside the tensor, so that only the numbers can tell."""
    x, cu_seqlens = torch.randn(64, 32), torch.tensor([0, 16, 32], dtype=torch.int32)
    right, wrong = (toy.launch(x, cu_seqlens, fault)[:16] for fault in ("none", "off by one in cu_seqlens"))
    assert not torch.allclose(right, wrong)


# --- the sanitizer's finer points ------------------------------------------------------------------------------------


@triton.jit
def copy(x, out, stride, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i * stride))


def test_the_gaps_of_a_view_are_outside():
    whole, out = torch.randn(16, 2), torch.empty(16)
    copy[(1,)](whole[:, 0], out, 2, 16)
    assert torch.equal(out, whole[:, 0])
    with pytest.raises(OutOfBounds):
        copy[(1,)](whole[:, 0], out, 1, 16)


def test_memory_beside_a_view_is_outside():
    whole = torch.randn(32)
    with pytest.raises(OutOfBounds):
        copy[(1,)](whole[16:31], torch.empty(16), 1, 16)


def test_two_lanes_of_one_store():
    @triton.jit
    def collide(out, N: tl.constexpr):
        tl.store(out + tl.arange(0, N) // 2, 1.0)

    with pytest.raises(Race, match="two lanes"):
        collide[(1,)](torch.empty(16), 16)


def test_a_write_after_another_programs_read():
    @triton.jit
    def shift(x):
        i = tl.program_id(0)
        value = tl.load(x + i + 1)
        tl.store(x + i, value)

    with pytest.raises(Race, match="stores to what another program reads"):
        shift[(4,)](torch.zeros(5))


def test_launches_are_ordered():
    x, out = torch.randn(16), torch.empty(16)
    for _ in range(2):
        copy[(1,)](x, out, 1, 16)
        copy[(1,)](out, x, 1, 16)


def test_a_grid_that_cuda_refuses():
    with pytest.raises(Fault, match="CUDA refuses the grid"):
        copy[(1, 65536)](torch.zeros(16), torch.empty(16), 1, 16)


def test_traffic_is_counted():
    case = next(case for case in toy.cases() if case.name == "tile_edges")
    arguments = case.build(torch.bfloat16, "cpu", 0)
    with sanitizer.recording() as launches:
        toy.launch(**arguments)
    (traffic,) = launches
    lengths = np.diff(arguments["cu_seqlens"].numpy())
    tiles = -(-lengths // toy.TILE)
    rows = lengths.sum()
    row_bytes = 32 * 2
    programs = -(-rows // toy.TILE) * len(lengths)
    assert traffic.distinct == 2 * rows * row_bytes + 4 * (len(lengths) + 1)
    assert traffic.requested == ((tiles * lengths).sum() + 2 * rows) * row_bytes + 2 * 4 * programs
