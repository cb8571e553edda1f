"""Proteins to model input, on one thread: `pytest benches/test_tokenize.py`.

The sample's 200 proteins at their natural lengths, Python included. Each bench is verified before it is timed: the
padded ones against fair-esm's `BatchConverter`, the packed ones against the padded rows without their padding.
`extra_info` of --benchmark-json holds residues/s.
"""

import gzip
import io
from pathlib import Path

import pytest

from esm_fast import _C
from esm_fast.alphabet import PAD, TOKENS, Alphabet
from esm_fast.sequences.batching import pack, plan
from esm_fast.sequences.fasta import parse_definition, read_fasta, records_from
from esm_fast.sequences.tokenize import Policy, Report, tokenize

SAMPLE = Path(__file__).parent.parent / "examples" / "uniprot_sample.fasta.gz"
FASTA = gzip.decompress(SAMPLE.read_bytes())
PROTEINS = parse_definition(FASTA)
RESIDUES = sum(len(sequence) for _, sequence in PROTEINS)
BATCH_TOKENS = 4096
POLICY = Policy(overlength="window")

# What the padded converters get: batches sorted by length, as a careful user makes them.
BATCHES = [[PROTEINS[i] for i in batch] for batch in plan([len(s) + 2 for _, s in PROTEINS], BATCH_TOKENS)]
RECORDS = list(records_from(PROTEINS))


@pytest.fixture(autouse=True)
def one_thread():
    before = _C.threads()
    _C.set_threads(1)
    yield
    _C.set_threads(before)


@pytest.fixture
def fair_esm():
    esm = pytest.importorskip("esm", reason="fair-esm is not installed")
    return esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()


def measure(benchmark, group, call):
    benchmark.group = group
    benchmark(call)
    benchmark.extra_info["residues/s"] = round(RESIDUES / benchmark.stats.stats.median)


def test_padded_fair_esm(benchmark, fair_esm):
    measure(benchmark, "padded", lambda: [fair_esm(batch)[2] for batch in BATCHES])


def test_padded_hugging_face(benchmark, fair_esm, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(TOKENS))
    tokenizer = transformers.EsmTokenizer(str(vocabulary))

    def convert():
        return [tokenizer([s for _, s in batch], padding=True, return_tensors="pt").input_ids for batch in BATCHES]

    assert all(ours.equal(fair_esm(batch)[2]) for ours, batch in zip(convert(), BATCHES, strict=True))
    measure(benchmark, "padded", convert)


def test_padded_esm_fast(benchmark, fair_esm):
    converter = Alphabet().get_batch_converter()

    def convert():
        return [converter(batch)[2] for batch in BATCHES]

    assert all(ours.equal(fair_esm(batch)[2]) for ours, batch in zip(convert(), BATCHES, strict=True))
    measure(benchmark, "padded", convert)


def packed(batches_of_records):
    """All stages from Records to PackedBatch."""
    for records in batches_of_records:
        tokens = tokenize(records, POLICY, Report())
        starts, lengths = tokens.offsets[:-1], tokens.lengths
        for batch in plan(lengths + 2, BATCH_TOKENS):
            yield pack(tokens.ids, starts, lengths, batch)


SOURCES = {
    "records": lambda: RECORDS,
    "strings": lambda: records_from(PROTEINS),
    "fasta": lambda: read_fasta(io.BytesIO(FASTA)),
    "fasta_gz": lambda: read_fasta(SAMPLE),
}


@pytest.mark.parametrize("source", SOURCES)
def test_packed_esm_fast(benchmark, fair_esm, source):
    for ours, batch in zip(packed(SOURCES[source]()), BATCHES, strict=True):
        tokens = fair_esm(batch)[2]
        assert ours.tokens.equal(tokens[tokens != PAD].int())
    measure(benchmark, "packed", lambda: list(packed(SOURCES[source]())))
