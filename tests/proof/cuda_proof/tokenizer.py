"""The GPU's tokeniser against the CPU's and against its definition in Python, on many records.

    python tests/proof/cuda_proof/tokenizer.py 1000000 proteins.fasta.gz ...     # random records, and those of files

Executed by the emulator, a batch of records a launch. The tests do the same with fewer.
"""

import re
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

from cuda_emulator.emulator import SOURCES, Emulator, Unit, loadable
from esm_fast.kernels.cuda import data
from esm_fast.kernels.cuda.common import executed_by

from esm_fast import _C
from esm_fast.alphabet import TOKENS, UnknownResidueError, encode_definition
from esm_fast.data import read_fasta

BATCH = 20_000
_LETTERS = np.frombuffer("".join(TOKENS[4:31]).encode(), np.uint8)
_SPECIAL = re.compile("|".join(re.escape(token.upper()) for token in TOKENS if len(token) > 1))


def tokenize_both(records: list[bytes]) -> data.TokenizedRecords:
    """Checks the GPU's ids and findings for these records against the CPU's; returns the GPU's."""
    residues = np.frombuffer(b"".join(records), dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, records)], dtype=np.int64)
    ids, ends, unknown, first, stops = _C.encode_records(residues, offsets)
    got = data.tokenize(torch.from_numpy(residues.copy()), torch.from_numpy(offsets))
    assert got.counts.tolist() == np.diff(ends).tolist()
    places = np.arange(len(ids)) + np.repeat(got.starts.numpy() - ends[:-1], np.diff(ends))
    assert np.array_equal(got.ids.numpy()[places], ids)
    for mine, theirs in ((got.unknown, unknown), (got.first_unknown, first), (got.stops, stops)):
        assert mine.tolist() == theirs.tolist()
    bad = np.flatnonzero(unknown)
    assert got.worst == (int(bad[0]) << 32 | int(first[bad[0]]) if len(bad) else 2**63 - 1)
    return got


def check_by_definition(records: list[bytes], got: data.TokenizedRecords) -> int:
    """Checks what the definition speaks of: ASCII without white space and without <pad>; returns how many they were.
    It knows special tokens in lower case alone, and no final '*'."""
    checked = 0
    for i, record in enumerate(records):
        text = record.decode("latin-1")
        if not text.isascii() or re.search(r"\s|<PAD>", text):
            continue
        text = _SPECIAL.sub(lambda token: token[0].lower(), text.removesuffix("*"))
        try:
            start = int(got.starts[i])
            assert encode_definition(text) == got.ids[start : start + int(got.counts[i])].tolist(), record
            assert not got.unknown[i]
        except UnknownResidueError as error:
            assert error.column - 1 == got.first_unknown[i] and got.unknown[i], record
        checked += 1
    return checked


def random_records(count: int, seed: int = 0) -> Iterator[bytes]:
    """Residues; every third record with pieces that are none: special tokens, stops, parts of both, any bytes."""
    generator = np.random.default_rng(seed)
    pieces = [*(token.upper().encode() for token in TOKENS if len(token) > 1), b"<MAS", b"<<", b">", b"*", b"J", b" "]
    for i in range(count):
        record = generator.choice(_LETTERS, generator.integers(0, 60)).tobytes()
        if i % 3 == 0:
            for _ in range(generator.integers(1, 4)):
                cut = int(generator.integers(0, len(record) + 1))
                odd = generator.integers(0, 4) == 0
                piece = generator.bytes(3).upper() if odd else pieces[generator.integers(len(pieces))]
                record = record[:cut] + piece + record[cut:]
        yield record


def file_records(path: str) -> Iterator[bytes]:
    for records in read_fasta(path):
        whole = records.residues.tobytes()
        yield from (whole[a:b] for a, b in zip(records.offsets, records.offsets[1:], strict=False))


def main(count: str, *paths: str) -> None:
    records = chain(random_records(int(count)), *map(file_records, paths))
    compared = defined = 0
    with executed_by(Emulator(loadable([Unit(SOURCES / "tokenize.cu", "f32")]), seed=1)):
        while batch := list(islice(records, BATCH)):
            defined += check_by_definition(batch, tokenize_both(batch))
            compared += len(batch)
            print(f"\r{compared:,} records equal the CPU's, {defined:,} the definition's", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
