"""Calls that between them launch every kernel that ships, with what they should return: for sanitizers and mutants."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from esm_fast.kernels.cuda import data
from esm_fast.kernels.cuda.layer_norm import layer_norm, layer_norm_grads

from esm_fast import _C, packing
from esm_fast.ops import OPS, verify
from esm_fast.ops.registry import kernels
from esm_fast.train.masking import Masker, Masking
from esm_fast.train.store import Store


class Exercise(NamedTuple):
    """run(dtype) launches kernels and returns whether what they computed is right."""

    name: str
    run: Callable[[torch.dtype], bool]


def exercises() -> list[Exercise]:
    ops = [kernel for op in OPS for kernel in kernels(op) if kernel.backend == "cuda"]
    by_op = [
        Exercise(f"{kernel.op}-{case.name}", lambda dtype, k=kernel, c=case: _verified(k, c, dtype))
        for kernel in ops
        for case in OPS[kernel.op].cases()
    ]
    own = (_layer_norm, _tokenize, _pack, _mask)
    return by_op + [Exercise(run.__name__.strip("_"), run) for run in own]


def _verified(kernel, case, dtype) -> bool:
    op = OPS[kernel.op]
    checks = verify.forward(op, kernel, case, dtype, "cpu") + verify.gradients(op, kernel, case, dtype, "cpu")
    return all(check.ok for check in checks)


def _layer_norm(dtype) -> bool:
    """More rows than the backward pass has blocks."""
    x, dy = torch.randn(2, 300, 64)
    gain, bias = torch.randn(2, 64).to(dtype)
    y, statistics = layer_norm(x, gain, bias, 1e-5, keep_statistics=True)
    dx, dgain, dbias = layer_norm_grads(x, gain, dy.to(dtype), statistics)
    return bool(torch.isfinite(dx).all()) and torch.allclose(dbias.float(), dy.sum(0), rtol=0.1, atol=0.5)


def _tokenize(dtype) -> bool:
    records = [b"MKV*", b"", b"A<NULL_1>K<MASK>", b"LAGVSERTIDPKQNFYMHWCXBUZO.-" * 5, b"M\0K V" * 20]
    residues = np.frombuffer(b"".join(records), dtype=np.uint8).copy()
    offsets = np.cumsum([0, *map(len, records)], dtype=np.int64)
    ids, ends, unknown, *_ = _C.encode_records(residues, offsets)
    got = data.tokenize(torch.from_numpy(residues), torch.from_numpy(offsets))
    spans = zip(got.starts.tolist(), got.counts.tolist(), strict=True)
    mine = [id for start, count in spans for id in got.ids[start : start + count].tolist()]
    return mine == ids.tolist() and got.unknown.tolist() == unknown.tolist()


def _pack(dtype) -> bool:
    ids, lengths = np.arange(4, 30, dtype=np.uint8), np.array([3, 0, 11, 5])
    starts, order = np.array([2, 0, 9, 21]), np.array([2, 1, 0, 3])
    batch = packing.pack(ids, starts, lengths, order)
    tensors = map(torch.from_numpy, (ids, starts, order))
    tokens, positions = data.pack_tokens(*tensors, batch.cu_seqlens, len(batch.tokens))
    return torch.equal(tokens, batch.tokens) and torch.equal(positions, batch.positions)


def masked_both(lengths, masking: Masking, epoch: int, seed: int, order):
    """((shown, targets) of the trainer, (shown, targets) of the kernel), of random records of these lengths."""
    tokens = np.random.default_rng(0).integers(4, 31, sum(lengths), dtype=np.uint8)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    store = Store(Path("in_memory"), {}, tokens, offsets, np.zeros(len(lengths), np.uint8))
    masker = Masker(store, masking, seed, max_residues=max(lengths))
    order = np.asarray(order)
    truth = masker.batch(order, epoch)
    starts, lengths = torch.from_numpy(offsets[order]), np.asarray(lengths)[order]
    ends = truth.batch.cu_seqlens
    plain = packing.pack(tokens, starts.numpy(), lengths, np.arange(len(order))).tokens
    targets = torch.full_like(plain, -100)
    targets[truth.rows] = truth.targets.int()
    got = data.mask_tokens(plain, ends, truth.batch.order, epoch, seed, masking)
    return (truth.batch.tokens, targets), got


def _mask(dtype) -> bool:
    """Records of one chunk of a block's threads, and of two."""
    truth, got = masked_both([1, 7, 300, 2, 5, 9, 4, 12], Masking(share=0.5), 1, 5, [2, 0, 1, 7, 6, 3, 4, 5])
    return all(torch.equal(a, b) for a, b in zip(truth, got, strict=True))
