"""FASTA to Records to Tokens: the C++ parser against its definition, damaged streams, policies and their counts."""

import bz2
import gzip
import io
import lzma
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from esm_fast import _C
from esm_fast.alphabet import TOKENS, X, encode_definition
from esm_fast.sequences.compression import decompress
from esm_fast.sequences.fasta import FastaError, Records, parse_definition, read_fasta, records_from
from esm_fast.sequences.names import accession, identifier
from esm_fast.sequences.tokenize import Policy, Report, tokenize

LENIENT = Policy(unknown="x", empty="skip", overlength="window", gaps="keep")


def zst(data, checksum=True):
    return zstandard.ZstdCompressor(write_checksum=checksum).compress(data)


COMPRESS = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zst,
}
kinds = pytest.mark.parametrize("kind", COMPRESS)


def read(data, **options):
    """All (header, residues) of FASTA bytes."""
    return [record for records in read_fasta(io.BytesIO(data), **options) for record in records]


def proteins(count, length=80, seed=0):
    """A FASTA of random proteins: it does not compress to nothing."""
    draw = random.Random(seed).choices
    return b"".join(b">p%d\n%s\n" % (i, bytes(draw(b"ACDEFGHIKLMNPQRSTVWY", k=length))) for i in range(count))


# ---- parsing

LINES = [b">", b"a", b"b c", b"MKT", b"mkt", b" ", b"\t", b"*", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xc3", b"<mask>"]
ENDS = [b"\n", b"\r", b"\r\n"]
fastas = st.lists(st.sampled_from([*LINES, *ENDS, b"\n>", b"\r>"]), max_size=25).map(b"".join)


@given(fastas | st.binary(max_size=20), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 20))
@example(b"\xef\xbb\xbf>a\r\nMK\r\nT\r\n", [1], 1)
@example(b"\xef\xbb\xbf", [1], 1)
@example(b"\xef\xbb", [1], 1)
@example(b"\xef>a", [1], 1)
@example(b">a\rMK\r>b\r\r\nT", [1], 1)
def test_pieces_give_the_records_of_the_definition(data, sizes, chunk_bytes):
    class Pieces(io.BytesIO):
        """Returns less than it is asked for, as a pipe does."""

        def read(self, size=-1):
            sizes.append(sizes.pop(0))
            return super().read(min(size, sizes[-1]))

    try:
        expected = parse_definition(data)
    except FastaError:
        with pytest.raises(FastaError):
            list(read_fasta(Pieces(data), chunk_bytes=chunk_bytes))
        return
    batches = list(read_fasta(Pieces(data), chunk_bytes=chunk_bytes))
    assert [record for records in batches for record in records] == expected
    assert [records.first for records in batches] == list(np.cumsum([0, *map(len, batches)])[:-1])
    lines = [int(line) for records in batches for line in records.lines]
    text = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    assert lines == [number for number, line in enumerate(text, 1) if line.startswith(b">")]


@given(st.lists(fastas, min_size=1, max_size=3), st.sampled_from([*COMPRESS]), st.integers(1, 40))
@example([b">a\r", b"\n>", b"b\0\nMK"], "gz", 1)
def test_members_cut_anywhere_give_the_records_of_the_definition(members, kind, chunk_bytes):
    stream = b"".join(map(COMPRESS[kind], members))
    try:
        expected = parse_definition(b"".join(members))
    except FastaError:
        with pytest.raises(FastaError):
            read(stream, chunk_bytes=chunk_bytes)
    else:
        assert read(stream, chunk_bytes=chunk_bytes) == expected


@pytest.mark.parametrize("byte", range(256))
def test_every_byte(byte):
    one = bytes([byte])
    for data in (b">a\nMK" + one + b"T\n>b\nA", b">a" + one + b"x\nMK\n", b">" + one + b"\n" + one + b"\n"):
        assert read(data) == parse_definition(data)
    for data in (one, one + b">a\nMK\n"):
        try:
            expected = parse_definition(data)
        except FastaError:
            with pytest.raises(FastaError):
                read(data)
        else:
            assert read(data) == expected


def test_forms():
    data = b"\xef\xbb\xbf>  first one \r\nmk t\r\n\r\n\tVRQG \r\n>\nA\n\n>sp|P1|N\rMK\r\rLA\n>last"
    assert read(data) == [("first one", "MKTVRQG"), ("seqnum000000004", "A"), ("sp|P1|N", "MKLA"), ("last", "")]


def test_records_know_where_they_are():
    (records,) = read_fasta(io.BytesIO(b"\n>a\nMK\nT\n>b\n\n>c\nA\n"))
    assert records.headers == ["a", "b", "c"]
    assert records.lines.tolist() == [2, 5, 7] and records.lines.dtype == np.int64
    assert bytes(records.residues) == b"MKTA" and records.residues.dtype == np.uint8
    assert records.offsets.tolist() == [0, 3, 3, 4] and records.offsets.dtype == np.int64
    assert (records.first, records.source, len(records)) == (0, "<stream>", 3)


def test_well_formed_fasta_is_read_as_fair_esm_reads_it(tmp_path):
    esm = pytest.importorskip("esm", reason="fair-esm is not installed")
    path = tmp_path / "x.fasta"
    path.write_bytes(b">sp|P1|N Some name OS=x\nMKT\nVRQ \n\n> b\r\nACD\r\n>\nWWW\n>c\tt\nAC\nDE")
    theirs = esm.FastaBatchedDataset.from_file(path)
    assert read(path.read_bytes()) == list(zip(theirs.sequence_labels, theirs.sequence_strs, strict=True))


def test_headers_that_are_not_utf8_and_long_ones():
    long = "h" * 300_000
    data = b">caf\xe9\nM\n>caf\xc3\xa9\nK\n>" + long.encode() + b"\nT"
    headers = [header for header, _ in read(data, chunk_bytes=1000)]
    assert headers == ["caf\ufffd", "café", long]


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\n \r\n"])
def test_no_record(data):
    with pytest.raises(FastaError, match="no FASTA record"):
        read(data)


@pytest.mark.parametrize("data, line", [(b"MKT\n>a\nMK", 1), (b"\r\n\n; note\n>a", 3), (b" >a", 1), (b"\xef\xbb>a", 1)])
def test_text_before_the_first_record(data, line):
    with pytest.raises(FastaError, match=f"^<stream>: line {line}: .* before the first '>'"):
        read(data)


def test_one_line_of_megabytes():
    sequence = b"ACDEFGHIKLMNPQRSTVWY" * 150_000
    batches = list(read_fasta(io.BytesIO(b">a\nMK\n>long\n" + sequence + b"\n>b\nMK\n"), chunk_bytes=1 << 16))
    records = [record for batch in batches for record in batch]
    assert records == [("a", "MK"), ("long", sequence.decode()), ("b", "MK")]


def test_memory_is_bounded_by_the_chunk():
    data = proteins(5000, 100)
    batches = list(read_fasta(io.BytesIO(data), chunk_bytes=10_000))
    assert len(batches) > 40
    assert max(batch.residues.nbytes for batch in batches) < 2 * 10_000
    assert [record for batch in batches for record in batch] == parse_definition(data)


# ---- sources


def test_path_and_compression_by_content(tmp_path):
    data = proteins(20)
    for kind, contents in {"plain": data, **{kind: compress(data) for kind, compress in COMPRESS.items()}}.items():
        path = tmp_path / f"{kind}.txt"
        path.write_bytes(contents)
        batches = list(read_fasta(path))
        assert [record for batch in batches for record in batch] == parse_definition(data)
        assert {batch.source for batch in batches} == {str(path)}


@pytest.mark.parametrize("compress", [bytes, *COMPRESS.values()], ids=["plain", *COMPRESS])
def test_standard_input(compress):
    script = "from esm_fast.sequences.fasta import read_fasta; print([r for b in read_fasta('-') for r in b])"
    data = proteins(3)
    done = subprocess.run([sys.executable, "-c", script], input=compress(data), capture_output=True, timeout=120)
    assert done.stdout.decode().strip() == str(parse_definition(data)), done.stderr.decode()


def test_files_of_others_stay_open_and_ours_are_closed(tmp_path):
    path = tmp_path / "x.fasta"
    path.write_bytes(b">a\nMK\n")
    with open(path, "rb") as stream:
        list(read_fasta(stream))
        assert not stream.closed
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(read_fasta(tmp_path / "nowhere"))
    with open(path) as stream, pytest.raises(TypeError, match="'rb'"):
        list(read_fasta(stream))


# ---- compressed streams


@kinds
@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 20])
def test_members_are_read_as_one(kind, chunk_bytes):
    data = proteins(30)
    for cuts in ([0], [0, 1000], [0, 0, 3, 1000, len(data)]):
        members = [data[a:b] for a, b in zip(cuts, [*cuts[1:], len(data)], strict=True)]
        stream = b"".join(map(COMPRESS[kind], members))
        assert read(stream, chunk_bytes=chunk_bytes) == parse_definition(data)
        assert read(stream + bytes(512), chunk_bytes=chunk_bytes) == parse_definition(data)  # padding, as on tapes


@kinds
def test_what_follows_the_last_member_is_an_error(kind):
    stream = COMPRESS[kind](proteins(3))
    for rest in (b"x", b"\0\0junk", b">b\nMKT\n"):
        with pytest.raises(FastaError, match="last complete record is 2 .*'p1'"):
            read(stream + rest)


@kinds
def test_cut_anywhere(kind):
    data = proteins(12)
    stream = COMPRESS[kind](data)
    for end in range(len(stream)):
        with pytest.raises(FastaError):
            read(stream[:end])
    two = stream + stream
    for end in range(len(stream) + 1, len(two)):
        with pytest.raises(FastaError, match=f"{kind} stream is cut short"):
            read(two[:end])


def test_a_gz_cut_anywhere_names_the_file_and_the_place(tmp_path):
    data, path = proteins(12), tmp_path / "cut.fasta.gz"
    stream, records = COMPRESS["gz"](data), parse_definition(data)
    for end in range(len(stream)):
        path.write_bytes(stream[:end])
        seen = []
        with pytest.raises(FastaError) as caught:
            for batch in read_fasta(path, chunk_bytes=64):
                seen += batch
        assert seen == records[: len(seen)]
        place = f"the last complete record is {len(seen)} (line {2 * len(seen) - 1}, 'p{len(seen) - 1}')"
        message = f"the gz stream is cut short; {place if seen else 'no record is complete'}"
        before_it_is_known = {0: "no FASTA record in it", 1: "line 1: "}  # two bytes say that it is a gz
        assert str(caught.value).startswith(f"{path}: {before_it_is_known.get(end, message)}")
    assert len(seen) == len(records) - 1  # those of the last cuts


@kinds
def test_a_flipped_bit_is_never_silent(kind):
    data = proteins(12)
    stream = COMPRESS[kind](data)
    errors = 0
    for at in range(len(stream)):
        damaged = bytearray(stream)
        damaged[at] ^= 1 << at % 8
        try:
            assert read(bytes(damaged)) == parse_definition(data)  # a bit of no meaning: the time in a gz header
        except FastaError:
            errors += 1
    assert errors > 0.9 * len(stream)


def test_wrong_checksum():
    stream = bytearray(COMPRESS["gz"](proteins(2)))
    stream[-5] ^= 1
    with pytest.raises(FastaError, match="gz stream is corrupt"):
        read(bytes(stream))


@kinds
def test_records_before_the_damage_are_yielded_and_named(kind):
    data = proteins(3000, seed=1)
    stream = COMPRESS[kind](data)
    seen = []
    with pytest.raises(FastaError) as caught:
        for records in read_fasta(io.BytesIO(stream + stream[: len(stream) // 2]), chunk_bytes=1000):
            seen += records
    assert len(seen) >= 2999
    assert seen == parse_definition(data + data)[: len(seen)]
    last = f"last complete record is {len(seen)} (line {2 * len(seen) - 1}, {seen[-1][0]!r})"
    assert str(caught.value).startswith(f"<stream>: the {kind} stream is cut short") and last in str(caught.value)


def test_output_of_a_dense_stream_is_bounded():
    data = b">a\n" + b"A" * 20_000_000  # 1,000 times its compressed size
    for kind in ("gz", "bz2", "xz"):
        pieces = list(decompress(io.BytesIO(COMPRESS[kind](data)), 1 << 16))
        assert max(map(len, pieces)) <= 1 << 16
        assert b"".join(pieces) == data


def test_zst_frames_without_checksum_or_size_and_with_skippable_frames():
    data = proteins(10)
    writer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    stream = writer.compress(data[:100]) + writer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    stream += writer.compress(data[100:]) + writer.flush()
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0note"
    assert read(stream) == read(stream + skippable) == read(skippable + stream) == parse_definition(data)
    assert read(zst(data[:500], False) + skippable + zst(data[500:], False)) == parse_definition(data)


# ---- sequences in memory


def test_records_from_strings_and_pairs():
    (records,) = records_from(["mk t", ("b", "KALTA<mask>ISQP"), ["c", ""]])
    assert list(records) == [("0", "MKT"), ("b", "KALTA<MASK>ISQP"), ("c", "")]
    assert records.lines.tolist() == [0, 0, 0]
    tokens = tokenize(records, LENIENT, Report())
    assert tokens.headers == ["0", "b"]
    assert tokens.ids.tolist() == encode_definition("MKT" + "KALTA<mask>ISQP")


def test_records_from_is_streamed():
    batches = list(records_from("A" * 500_000 for _ in range(10)))
    assert [(len(batch), batch.first) for batch in batches] == [(3, 0), (3, 3), (3, 6), (1, 9)]
    assert [label for batch in batches for label, _ in batch] == [str(i) for i in range(10)]
    assert list(records_from([])) == []


@pytest.mark.parametrize("text", ["é", "Ｌ", "\ud800", "ß", "ſ", "\xa0", "😀"])
def test_characters_that_are_not_ascii_are_one_unknown_residue(text):
    (records,) = records_from([f"MK{text}T"])
    report = Report()
    assert tokenize(records, LENIENT, report).ids.tolist() == encode_definition("MKXT")
    assert report.unknown == 1


@pytest.mark.parametrize("sequences", ["MKT", b"MKT", [b"MKT"], [("a", "b", "c")], [("a", None)], [3]])
def test_records_from_mistakes(sequences):
    with pytest.raises(TypeError):
        list(records_from(sequences))


# ---- tokens and policies


def some_records(*residues, source="x.fasta"):
    offsets = np.cumsum([0, *map(len, residues)])
    headers = [f"id{i} rest" for i in range(len(residues))]
    lines = 1 + 2 * np.arange(len(residues))
    return Records(headers, lines, np.frombuffer(b"".join(residues), np.uint8), offsets, 0, source)


def in_memory(records):
    """The same without a file, of which some bytes are refused that a string may hold."""
    return replace(records, lines=np.zeros_like(records.lines))


def tokenize_definition(residues):
    """(ids, columns of the unknown residues) of a record's bytes."""
    specials = {token.upper().encode(): i for i, token in enumerate(TOKENS) if token[0] == "<" and token != "<pad>"}
    residues = residues.removesuffix(b"*")
    ids, unknown, at = [], [], 0
    while at < len(residues):
        special = next((s for s in specials if residues.startswith(s, at)), None)
        letter = chr(residues[at])
        if special:
            ids.append(specials[special])
        elif letter in TOKENS:
            ids.append(TOKENS.index(letter))
        else:
            ids.append(X)
            unknown.append(at)
        at += len(special) if special else 1
    return ids, unknown


PARTS = [b"MKTVRQGLLS", b"X", b".", b"-", b"J", b"*", b"<MASK>", b"<UNK>", b"<PAD>", b"<", b"m", b"\0", b"\xff"]
residue_bytes = st.lists(st.sampled_from(PARTS), max_size=6).map(b"".join)


@given(st.lists(residue_bytes, max_size=8), st.sampled_from(["x", "skip"]), st.sampled_from(["truncate", "window"]))
def test_tokens_are_those_of_the_definition(residues, unknown, overlength):
    policy, report = Policy(unknown, "skip", overlength, max_residues=12, gaps="keep"), Report()
    tokens = tokenize(in_memory(some_records(*residues)), policy, report)
    expected = []
    for number, (ids, columns) in enumerate(map(tokenize_definition, residues)):
        if ids and not (columns and unknown == "skip"):
            expected.append((number, ids[:12] if overlength == "truncate" else ids))
    assert tokens.numbers.tolist() == [number for number, _ in expected]
    assert tokens.headers == [f"id{number} rest" for number, _ in expected]
    assert tokens.ids.tolist() == [i for _, ids in expected for i in ids]
    assert tokens.lengths.tolist() == [len(ids) for _, ids in expected]
    assert (tokens.ids.dtype, tokens.offsets.dtype, tokens.numbers.dtype) == (np.uint8, np.int64, np.int64)
    assert report.records == len(residues)
    assert report.kept == len(tokens) == report.records - len(report.skipped)
    assert report.residues == len(tokens.ids)


@pytest.mark.parametrize("byte", range(256))
def test_every_byte_becomes_its_token_or_an_error(byte):
    records = some_records(b"MK", b"MK%cT" % byte)
    ids, unknown = tokenize_definition(b"MK%cT" % byte)
    if byte == ord(">"):
        return  # see test_a_header_within_residues_is_refused_whatever_the_policy
    assert tokenize(in_memory(records), LENIENT, Report()).ids.tolist() == encode_definition("MK") + ids
    if not unknown:
        assert tokenize(records, Policy(gaps="keep"), Report()).ids.tolist() == encode_definition(f"MKMK{chr(byte)}T")
    else:
        with pytest.raises(FastaError) as caught:
            tokenize(records, Policy(), Report())
        place = f"x.fasta: record 2 (line 3, 'id1'), column 3: {chr(byte)!r} (0x{byte:02x}) is not a residue"
        assert str(caught.value).startswith(place)


def test_every_byte_in_every_part_of_a_long_record():
    """Letters are read 32 at a time: a byte among the first, across, and behind the last of these."""
    letters = b"LAGVSERTIDPKQNFYMHWCXBUZO" * 3
    odd = [bytes([byte]) for byte in range(256) if byte != ord(">")]
    texts = [letters[:at] + byte + letters[at:] for at in (0, 31, 32, 40, 63, 64, 75) for byte in odd]
    tokens = tokenize(in_memory(some_records(*texts)), Policy(unknown="x", gaps="keep"), Report())
    for i, text in enumerate(texts):
        expected, _ = tokenize_definition(text)
        assert tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() == expected, (i, text)


def test_final_stop_is_stripped_once():
    report = Report()
    tokens = tokenize(some_records(b"MK*", b"M", b"*"), Policy(empty="skip"), report)
    assert tokens.ids.tolist() == encode_definition("MKM")
    assert tokens.offsets.tolist() == [0, 2, 3]
    assert (report.stops_stripped, report.empty, report.kept) == (1, 1, 2)
    with pytest.raises(FastaError, match="column 3: '\\*'"):
        tokenize(some_records(b"MK**"), Policy(), Report())


def test_unknown_policies():
    records = some_records(b"MKJ", b"MK", b"1A2")
    report = Report()
    assert tokenize(records, Policy(unknown="x"), report).ids.tolist() == encode_definition("MKXMKXAX")
    assert (report.unknown, report.skipped_unknown, report.kept) == (3, 0, 3)
    report = Report()
    tokens = tokenize(records, Policy(unknown="skip"), report)
    assert (tokens.headers, tokens.numbers.tolist()) == (["id1 rest"], [1])
    assert (report.unknown, report.skipped_unknown, report.kept) == (0, 2, 1)
    assert report.skipped == [(0, "id0", "unknown residue"), (2, "id2", "unknown residue")]


def test_empty_policies():
    records = some_records(b"MK", b"")
    with pytest.raises(FastaError, match="record 2 \\(line 3, 'id1'\\): it has no residues; use empty='skip'"):
        tokenize(records, Policy(), Report())
    report = Report()
    assert tokenize(records, Policy(empty="skip"), report).headers == ["id0 rest"]
    assert (report.empty, report.skipped) == (1, [(1, "id1", "empty")])


def test_overlength_policies():
    records = some_records(b"MKT", b"MKTVR", b"MKTV")
    with pytest.raises(FastaError, match="'id1'\\): it has 5 residues and the limit is 4; use overlength='window'"):
        tokenize(records, Policy(max_residues=4), Report())
    report = Report()
    tokens = tokenize(records, Policy(overlength="truncate", max_residues=4), report)
    assert (tokens.lengths.tolist(), report.truncated, report.residues) == ([3, 4, 4], 1, 11)
    assert tokens.ids.tolist() == encode_definition("MKTMKTVMKTV")
    report = Report()
    tokens = tokenize(records, Policy(overlength="window", max_residues=4), report)
    assert (tokens.lengths.tolist(), report.windowed, report.residues) == ([3, 5, 4], 1, 12)


def test_a_skipped_record_is_not_too_long():
    report = Report()
    policy = Policy(unknown="skip", max_residues=4)
    assert len(tokenize(some_records(b"MKTJJJ"), policy, report)) == 0
    assert (report.truncated, report.windowed, report.skipped_unknown) == (0, 0, 1)


@pytest.mark.parametrize(
    "residues, message",
    [
        ((b"MK", b"", b"J", b"MKTVR"), "no residues"),
        ((b"J", b""), "'J'"),
        ((b"MKTVR", b"J"), "5 residues"),
        ((b"JJJJJ",), "'J'"),
    ],
)
def test_the_first_refused_record_is_the_one_named(residues, message):
    report = Report()
    with pytest.raises(FastaError, match=message):
        tokenize(some_records(*residues), Policy(max_residues=4), report)
    assert report == Report()


def test_the_list_of_skipped_records_is_bounded_and_the_count_is_not():
    report = Report()
    for _ in range(3):
        assert len(tokenize(some_records(*[b""] * 700), Policy(empty="skip"), report)) == 0
    assert (report.empty, report.records, report.kept, len(report.skipped)) == (2100, 2100, 0, 1000)


def test_numbers_count_from_the_start_of_the_source():
    policy, report, seen = Policy(unknown="skip"), Report(), []
    data = b"".join(b">r%d\n%s\n" % (i, b"MKJ" if i % 3 == 0 else b"MK") for i in range(100))
    for records in read_fasta(io.BytesIO(data), chunk_bytes=50):
        tokens = tokenize(records, policy, report)
        assert tokens.headers == [f"r{number}" for number in tokens.numbers]
        seen += tokens.numbers.tolist()
    assert seen == [i for i in range(100) if i % 3]
    assert (report.records, report.kept, report.skipped_unknown) == (100, 66, 34)


@pytest.mark.parametrize(
    "mistake", [{"unknown": "ignore"}, {"empty": "x"}, {"overlength": "cut"}, {"max_residues": 0}, {"unknown": None}]
)
def test_policies_are_checked(mistake):
    with pytest.raises(ValueError, match=next(iter(mistake))):
        Policy(**mistake)


def test_records_must_be_sound():
    for offsets in ([0, 3, 2], [0, 5], [-1, 2]):
        with pytest.raises(ValueError, match="offsets"):
            _C.encode_records(np.zeros(4, np.uint8), np.array(offsets))


def test_threads_change_nothing():
    records = some_records(*(b"MKTVRQGLLSJ<MASK>" * (37 * i % 900) + b"*" * (i % 2) for i in range(300)))
    expected = [i for _, text in records for i in tokenize_definition(bytes(text, "latin-1"))[0]]
    before = _C.threads()
    try:
        for threads in (1, 2, 5):
            _C.set_threads(threads)
            assert tokenize(records, LENIENT, Report()).ids.tolist() == expected
    finally:
        _C.set_threads(before)


# ---- what is no FASTA of proteins, or hardly as it was meant

first_parts = st.lists(st.sampled_from([b"MKT", b"J", b"<mask>", b"<pad>", b"*", b"1"]), min_size=1, max_size=4)


@given(
    first_parts.map(b"".join),
    st.sampled_from([b"", b"\r\n", b"\n"]),
    st.sampled_from(["error", "x", "skip"]),
    st.sampled_from([1, 7, 1 << 20]),
)
def test_a_header_within_residues_is_refused_whatever_the_policy(residues, end, unknown, chunk_bytes):
    """Files joined of which one lacks its last line break: b would be swallowed by a."""
    data = b">a one\n" + residues + end + b">sp|P0|B_HUMAN two\nMKV\n"
    policy, report = Policy(unknown=unknown, empty="skip", overlength="window"), Report()

    def run():
        batches = list(read_fasta(io.BytesIO(data), chunk_bytes=chunk_bytes))
        return [header for records in batches for header in tokenize(records, policy, report).headers]

    if not end:
        with pytest.raises(FastaError) as caught:
            run()
        if unknown != "error":
            assert "line break is missing before a header" in str(caught.value)
            assert "record 1 (line 1, 'a')" in str(caught.value) and ">SP|P0|B_HUMAN" in str(caught.value)
    elif unknown != "error":
        assert run()[-1] == "sp|P0|B_HUMAN two"


def test_a_header_within_residues_in_memory():
    (records,) = records_from([("a", "MKT>b"), ("c", "MK<mask>T")])
    with pytest.raises(FastaError, match="column 4: '>B' stands within the residues"):
        tokenize(records, Policy(unknown="x"), Report())
    (records,) = records_from(["MK<mask>T<cls>", "<eos><unk>"])
    assert len(tokenize(records, Policy(), Report())) == 2


@pytest.mark.parametrize(
    ("text", "column", "what"),
    [
        (b"MK\0\0", 3, "a NUL, as in UTF-16"),
        ("MK".encode("utf-16-le"), 2, "a NUL, as in UTF-16"),
        ("MK\xa0T".encode(), 3, "beyond ASCII, such as a non-breaking space"),
        ("MK\u2028T".encode(), 3, "beyond ASCII"),
        ("M\u0391T".encode(), 2, "beyond ASCII, .* a letter that looks like another"),
        (b";comment\nMK", 1, "the sign of a comment"),
        (b"MK\x1a", 3, "a control character"),
        (b"MK\x1b[31m", 3, "a control character"),
    ],
)
def test_what_is_no_residue_of_a_file_is_not_read_as_x(text, column, what):
    """One character would become two or three residues, a comment's letters residues, and padding a tail of X."""
    (records,) = read_fasta(io.BytesIO(b">ok\nMKJ\n>a b\n" + text + b"\n"))
    place = rf"record 2 .line 3, 'a'., column {column}: .* is not a residue ESM-1b knows: it is .*{what}"
    with pytest.raises(FastaError, match=place):
        tokenize(records, Policy(unknown="x", empty="skip"), Report())
    report = Report()
    assert tokenize(records, Policy(unknown="skip", empty="skip"), report).ids.tolist() == []
    assert report.skipped_unknown == 2
    (records,) = read_fasta(io.BytesIO(b">a b\n" + text + b"\n"))
    with pytest.raises(FastaError, match=f"column {column}: .*{what}") as caught:
        tokenize(records, Policy(), Report())
    assert "unknown='x'" not in str(caught.value)


@pytest.mark.parametrize("code", ["P1", "F1", "XX"])
@pytest.mark.parametrize("unknown", ["error", "x", "skip"])
def test_pir_is_refused(code, unknown):
    (records,) = read_fasta(io.BytesIO(f">a\nMK\n>{code};CRAB_X\nalpha crystallin B chain - duck\nMKTV*\n".encode()))
    with pytest.raises(FastaError, match=f"record 2 .line 3, '{code};CRAB_X'.: this is the PIR"):
        tokenize(records, Policy(unknown=unknown, gaps="keep"), Report())


def test_gaps_are_refused_in_files_or_removed_or_kept():
    a3m = b">query\nMKTVRQ\n>A/1-20\nMK--VRaq..ER\n>C\nMK\n>B\n---\n>D\n.M.K.\n"
    (records,) = read_fasta(io.BytesIO(a3m))
    for policy in (Policy(), Policy(gaps="error"), Policy(unknown="x", empty="skip")):
        with pytest.raises(FastaError, match="record 2 .line 3, 'A/1-20'., column 3: '-' is a gap, as in an alignment"):
            tokenize(records, policy, Report())
    report = Report()
    tokens = tokenize(records, Policy(gaps="remove", empty="skip"), report)
    assert tokens.headers == ["query", "A/1-20", "C", "D"]
    assert tokens.ids.tolist() == encode_definition("MKTVRQ" + "MKVRAQER" + "MK" + "MK")
    assert (report.gaps_removed, report.empty, report.residues) == (10, 1, 18)
    kept = tokenize(records, Policy(gaps="keep"), Report())
    assert kept.lengths.tolist() == [6, 12, 2, 3, 5]
    (in_memory,) = records_from(["MK-T.", "MK"])
    assert len(tokenize(in_memory, Policy(), Report())) == 2  # a string is as its caller gave it
    with pytest.raises(FastaError, match="gap"):
        tokenize(in_memory, Policy(gaps="error"), Report())


def test_removing_gaps_of_some_records_of_several():
    """Records need not begin at the first residue."""
    whole = some_records(b"A-A", b"M-K", b"-", b"C.C")
    part = replace(whole, headers=whole.headers[1:], lines=whole.lines[1:], offsets=whole.offsets[1:])
    tokens = tokenize(part, Policy(gaps="remove", empty="skip"), Report())
    assert tokens.ids.tolist() == encode_definition("MKCC") and tokens.headers == ["id1 rest", "id3 rest"]


def test_special_tokens_may_be_skipped():
    report = Report()
    policy = Policy(specials="skip", empty="skip", unknown="skip")
    tokens = tokenize(some_records(b"MK", b"M<MASK>", b"", b"<CLS>", b"J<MASK>", b"V"), policy, report)
    assert tokens.headers == ["id0 rest", "id5 rest"] and (report.specials, report.empty) == (2, 1)
    assert [(skip.place, skip.reason, skip.detail) for skip in tokens.skipped] == [
        (1, "special token", ""),
        (2, "empty", ""),
        (3, "special token", ""),
        (4, "unknown residue", "'J' at 1"),
    ]


@pytest.mark.parametrize("chunk_bytes", [10, 1000, 1 << 20])
@pytest.mark.parametrize("where", ["residues", "header", "lines"])
def test_a_record_over_the_limit_is_an_error_in_bounded_memory(where, chunk_bytes):
    large = {
        "residues": b">big one\n" + b"A" * 5000,
        "header": b">big one " + b"h" * 5000,
        "lines": b">big one\n" + b"AC\n" * 2500,
    }
    data = b">a\nMK\n" + large[where] + b"\n>b\nMK\n"
    assert len(read(data, chunk_bytes=chunk_bytes, max_record=6000)) == 3
    with pytest.raises(FastaError, match="line 3: the record 'big one.* has more than 4,000 bytes"):
        read(data, chunk_bytes=chunk_bytes, max_record=4000)
    exact = b">abc\n" + b"A" * 97
    assert read(exact, max_record=100) == [("abc", "A" * 97)]
    with pytest.raises(FastaError, match="99 bytes"):
        read(exact, max_record=99)


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_bomb_stays_small(kind):
    """A gigabyte in a record of a few kilobytes: nothing near it is ever in memory."""
    code = """
import io, resource, sys
from esm_fast.sequences.fasta import FastaError, read_fasta
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    list(read_fasta(sys.stdin.buffer))
except FastaError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    one = COMPRESS[kind](b"A" * (1 << 24))
    data = COMPRESS[kind](b">big\n") + one * 64
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, timeout=300)
    message, grown = done.stdout.decode().splitlines()
    assert "the record 'big' has more than 10,000,000 bytes" in message and int(grown) < 200


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"# STOCKHOLM 1.0\nA MK\n", "Stockholm"),
        (b"CLUSTAL W\n", "Clustal"),
        (b"@read\nACGT\n", "FASTQ"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"LOCUS  X\n", "GenBank"),
        (">a\nMK\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_formats_given_in_the_place_of_fasta_are_named(data, what):
    with pytest.raises(FastaError, match=f"looks like .*{what}"):
        read(data)


# ---- headers


@pytest.mark.parametrize(
    "header, first, accessed",
    [
        ("sp|P12345|NAME_HUMAN Some protein OS=x", "sp|P12345|NAME_HUMAN", "P12345"),
        ("tr|A0A1|X y", "tr|A0A1|X", "A0A1"),
        ("sp|P12345", "sp|P12345", "sp|P12345"),
        ("sp||N", "sp||N", "sp||N"),
        ("UniRef50_Q9 n=1", "UniRef50_Q9", "UniRef50_Q9"),
        ("gi|1|gb|A", "gi|1|gb|A", "gi|1|gb|A"),
        ("a\tb", "a", "a"),
        ("", "", ""),
    ],
)
def test_identifiers(header, first, accessed):
    assert (identifier(header), accession(header)) == (first, accessed)
