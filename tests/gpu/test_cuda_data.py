"""The CUDA data path, executed by the emulator: bit for bit what the CPU computes."""

import numpy as np
import pytest
import torch
from cuda_emulator.exercises import masked_both
from cuda_proof.tokenizer import check_by_definition, random_records, tokenize_both
from esm_fast.kernels.cuda import data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esm_fast import packing
from esm_fast.train.masking import Masking

pytestmark = pytest.mark.usefixtures("emulated")

STANDARD = b"LAGVSERTIDPKQNFYMHWC"
SPECIAL = [b"<CLS>", b"<EOS>", b"<UNK>", b"<NULL_1>", b"<MASK>", b"<PAD>", b"<MASK", b"<<MASK>", b"*", b"\0", b" "]


def test_every_byte():
    tokenize_both([bytes([byte]) for byte in range(256)])
    tokenize_both([b"MKV" + bytes([byte]) * 2 + b"A" for byte in range(256)] + [bytes(range(256))])


def test_random_records_are_the_definition_s():
    """A million of them are for `python tests/proof/cuda_proof/tokenizer.py`."""
    records = list(random_records(3000))
    assert check_by_definition(records, tokenize_both(records)) > 2000


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


# --- masking ---------------------------------------------------------------------------------------------------------


MASKINGS = {
    "card": Masking(),
    "fairseq": Masking(specials="selected"),
    "amino_acids": Masking(share=0.31, masked=0.1, replaced=0.7, replacements="amino_acids"),
    "validation": Masking().for_validation(),
    "everything": Masking(share=1.0, masked=0.0, replaced=1.0),
}


@pytest.mark.parametrize("name", MASKINGS)
@pytest.mark.parametrize("epoch, seed", [(0, 0), (3, 2**62 + 12345)])
def test_masking_is_the_trainer_s(name, epoch, seed):
    """Which rows, what they show and what is asked for, in a batch of another order than the records'."""
    truth, got = masked_both([1, 2, 500, 33, 1022, 3, 254], MASKINGS[name], epoch, seed, [4, 0, 2, 1, 6, 5, 3])
    for of_trainer, of_kernel in zip(truth, got, strict=True):
        assert torch.equal(of_trainer, of_kernel)
    assert (got[1] >= 0).any()


def test_masking_does_not_look_at_neighbours():
    tokens, ends = torch.arange(4, 30).int(), torch.tensor([0, 0, 20, 26, 26], dtype=torch.int32)
    records = torch.tensor([7, 2**40 + 1, 9, 3])
    together = data.mask_tokens(tokens, ends, records, 2, 11, Masking(share=0.5))
    alone = data.mask_tokens(tokens[:20], ends[1:3], records[1:2], 2, 11, Masking(share=0.5))
    assert all(torch.equal(a[:20], b) for a, b in zip(together, alone, strict=True))
    assert (together[1][:20] >= 0).sum() in (9, 10) and together[1][0] == together[1][19] == -100
