"""The alphabet and the C++ encoder against fair-esm and against the Python definition."""

import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from esm_fast import _C
from esm_fast.alphabet import CLS, EOS, MASK, PAD, TOKENS, UNK, Alphabet, UnknownResidueError, X, encode_definition

ALPHABET = Alphabet.from_architecture("ESM-1b")

# fair-esm's own table for ESM-1b and ESM-1v.
TABLE = [("protein1", "MKTVRQG"), ("protein2 with mask", "KALTA<mask>ISQP"), ("protein3", "K A <mask> I S Q")]
TABLE_TOKENS = [
    [0, 20, 15, 11, 7, 10, 16, 6, 2, 1, 1, 1],
    [0, 15, 5, 4, 11, 5, 32, 12, 8, 16, 14, 2],
    [0, 15, 5, 32, 12, 8, 16, 2, 1, 1, 1, 1],
]

# Tokens, what almost is one, every kind of white space str.split() knows, and what no protein holds.
PIECES = [*TOKENS, "<", ">", "<mas", "k>", "<MASK>", "J", "*", "m", "0", "\0", "\x7f", "é", "Ｌ", "\ud800", "😀"]
SPACES = [" ", "\t", "\n", "\r", "\v", "\f", "\x1c", "\x1f", "\x85", "\xa0", "\u2003", "\u3000"]
texts = st.lists(st.sampled_from([*PIECES, *SPACES]), max_size=12).map("".join) | st.text(max_size=12)
proteins = st.lists(st.sampled_from([*TOKENS, *SPACES]), max_size=30).map("".join)


@pytest.fixture(scope="module")
def fair():
    esm = pytest.importorskip("esm", reason="fair-esm is not installed")
    return esm.Alphabet.from_architecture("ESM-1b")


def outcome(encode, text):
    """The ids, or the unknown run."""
    try:
        return list(encode(text))
    except KeyError as error:
        return error.args[0]


def test_constants():
    assert [TOKENS[i] for i in (CLS, PAD, EOS, UNK, X, MASK)] == ["<cls>", "<pad>", "<eos>", "<unk>", "X", "<mask>"]
    assert (CLS, PAD, EOS, UNK, X, MASK) == (0, 1, 2, 3, 24, 32)


def test_face_is_fair_esms(fair):
    assert vars(ALPHABET) == vars(fair)
    assert len(ALPHABET) == len(fair) == 33
    assert ALPHABET.to_dict() == fair.to_dict()
    for token in (*TOKENS, "J", ""):
        assert ALPHABET.get_idx(token) == fair.get_idx(token)
    assert [ALPHABET.get_tok(i) for i in range(33)] == fair.all_toks
    assert vars(Alphabet.from_architecture("roberta_large")) == vars(fair)


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="ESM-1b"):
        Alphabet.from_architecture("msa_transformer")


def test_table():
    labels, strings, tokens = ALPHABET.get_batch_converter()(TABLE)
    assert (labels, strings) == ([label for label, _ in TABLE], [string for _, string in TABLE])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == TABLE_TOKENS


@pytest.mark.parametrize("length", [None, 0, 1, 3, 7, 10, 11, 1022])
def test_truncation(fair, length):
    batch = [*TABLE, ("long", "MKTVRQGLLS" * 3), ("empty", "")]
    ours, theirs = ALPHABET.get_batch_converter(length)(batch), fair.get_batch_converter(length)(batch)
    assert ours[:2] == theirs[:2]
    assert ours[2].equal(theirs[2])


@pytest.mark.parametrize("byte", range(256))
def test_every_byte(fair, byte):
    for text in (chr(byte), f"MK{chr(byte)}T", f"<mask>{chr(byte)}{chr(byte)}"):
        assert outcome(ALPHABET.encode, text) == outcome(encode_definition, text) == outcome(fair.encode, text)


@given(texts | proteins)
@example("<cl<mask>s>")
@example("<<mask>>")
@example("JJ J")
@example("M\xa0K")
def test_encode_is_fair_esms(fair, text):
    assert outcome(ALPHABET.encode, text) == outcome(encode_definition, text) == outcome(fair.encode, text)
    assert ALPHABET.tokenize(text) == fair.tokenize(text)


@given(st.lists(proteins, min_size=1, max_size=6), st.integers(0, 12) | st.none())
def test_batches_are_fair_esms(fair, strings, length):
    batch = [(str(i), string) for i, string in enumerate(strings)]
    assert ALPHABET.get_batch_converter(length)(batch)[2].equal(fair.get_batch_converter(length)(batch)[2])


@given(st.lists(texts, min_size=1, max_size=6))
def test_batch_errors_are_fair_esms(fair, strings):
    batch = [(str(i), string) for i, string in enumerate(strings)]
    ours = outcome(lambda pairs: ALPHABET.get_batch_converter()(pairs)[2].tolist(), batch)
    assert ours == outcome(lambda pairs: fair.get_batch_converter()(pairs)[2].tolist(), batch)


@given(texts)
def test_error_names_the_column(text):
    try:
        ALPHABET.encode(text)
    except UnknownResidueError as error:
        assert text[error.column - 1 :].startswith(error.run)
        again = pickle.loads(pickle.dumps(error))
        assert (again.run, again.column, str(again)) == (error.run, error.column, str(error))


def test_error_message():
    with pytest.raises(UnknownResidueError) as caught:
        ALPHABET.get_batch_converter()([("good", "MKT"), ("bad one", "MKTJJ A"), ("worse", "123")])
    error = caught.value
    assert (error.label, error.run, error.column, error.args) == ("bad one", "JJ", 4, ("JJ",))
    assert str(error).startswith("sequence 'bad one', column 4: 'JJ' is not a residue")
    assert isinstance(error, KeyError) and isinstance(error, ValueError)
    with pytest.raises(UnknownResidueError, match="upper case"):
        ALPHABET.encode("mkt")


def test_batch_mistakes():
    convert = ALPHABET.get_batch_converter()
    with pytest.raises(ValueError, match="empty"):
        convert([])
    with pytest.raises(TypeError, match="'a' is a bytes"):
        convert([("a", b"MKT")])
    with pytest.raises(ValueError, match="-1"):
        ALPHABET.get_batch_converter(-1)


def test_encoder_takes_only_ascii():
    with pytest.raises(TypeError):
        _C.encode_texts(("é",), 10)
    with pytest.raises(TypeError):
        _C.encode_texts((b"M",), 10)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    batch = [(str(i), "MKTVRQGLLSX <mask>" * (200 + 37 * i % 1000)) for i in range(100)]  # enough for several pieces
    before = _C.threads()
    try:
        _C.set_threads(threads)
        tokens = ALPHABET.get_batch_converter()(batch)[2]
    finally:
        _C.set_threads(before)
    for row, (_, string) in zip(tokens.tolist(), batch, strict=True):
        ids = encode_definition(string)
        assert row == [CLS, *ids, EOS] + [PAD] * (tokens.shape[1] - len(ids) - 2)
