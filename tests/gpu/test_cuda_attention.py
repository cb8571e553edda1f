"""What attention's contract does not ask for: its bits, the requests it declines, and the blocks that fit on an SM."""

import pytest
import torch
from cuda_emulator.emulator import Emulator
from cuda_proof import audit
from esm_fast.kernels.cuda.attention_varlen import attend, attend_backward, why_not
from esm_fast.kernels.cuda.common import executed_by
from esm_fast.kernels.cuda.contact_map import contact_map

from esm_fast.ops.registry import Request


def results(library, seed, lengths, q, k, v, grad):
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    with executed_by(Emulator(library, seed=seed)):
        out, lse = attend(q, k, v, ends, max(lengths), 0.25)
        return out, *attend_backward(q, k, v, out, lse, grad, ends, max(lengths), 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_neighbours_and_schedules_change_no_bit(cuda_library, dtype):
    lengths = [5, 70, 33]
    tensors = torch.randn(4, sum(lengths), 2, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    together = results(cuda_library, 0, lengths, *tensors)
    again = results(cuda_library, 7, lengths, *tensors)
    alone = [results(cuda_library, 3, [part.shape[1]], *part.contiguous()) for part in tensors.split(lengths, 1)]
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(together, zip(*alone, strict=True), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_contacts_do_not_depend_on_neighbours_and_are_symmetric(dtype, cuda_library):
    lengths = [5, 70, 33]
    q, k = torch.randn(2, sum(lengths), 2, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep, weight = torch.arange(sum(lengths)) % 9 > 0, torch.tensor([1.0, -0.5])

    def contacts(seed, lengths, q, k, keep):
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
        with executed_by(Emulator(cuda_library, seed=seed)):
            return contact_map(q, k, ends, max(lengths), sum(n * n for n in lengths), keep, weight, 0.25)

    together = contacts(0, lengths, q, k, keep)
    parts = zip(lengths, *(tensor.split(lengths) for tensor in (q, k, keep)), strict=True)
    alone = [contacts(3, [length], *part) for length, *part in parts]
    assert torch.equal(together, torch.cat(alone))
    for length, part in zip(lengths, alone, strict=True):
        assert torch.equal(part.view(length, length), part.view(length, length).T)


@pytest.mark.usefixtures("emulated")
def test_what_is_declined():
    request = Request("cpu", (7, 5), torch.float32, 128, True)
    assert why_not(request._replace(dtype=torch.float16)) == why_not(request._replace(arch=(8, 0))) == []
    assert "more shared memory than this GPU has" in why_not(request)[0]
    assert why_not(request._replace(head_dim=136)) == ["takes heads of up to 128 columns, these have 136"]
    assert "for float32 of heads of 128" in why_not(request._replace(grad=False), 2)[0]


def test_two_blocks_fit_on_a_v100():
    of_heads = [f for f in audit.read_table() if f.kernel.startswith(("attention", "contact")) and f.arch == 70]
    blocks = [facts.blocks for facts in of_heads if facts.kernel.endswith("_64")]
    assert len(blocks) == 18 and min(blocks) >= 2
