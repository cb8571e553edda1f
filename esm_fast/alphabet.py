"""The 33 tokens of ESM-1b, fair-esm's `Alphabet` and `BatchConverter`, and the definition of the C++ encoder."""

import re
from collections.abc import Sequence

import torch

from esm_fast import _C

TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")
CLS, PAD, EOS, UNK, X, MASK = (TOKENS.index(token) for token in ("<cls>", "<pad>", "<eos>", "<unk>", "X", "<mask>"))

_TOKEN = "|".join(map(re.escape, TOKENS))
_PIECE = re.compile(rf"{_TOKEN}|(?:(?!{_TOKEN})\S)+")  # a token, or a run that is none up to a token or white space
_INDEX = {token: index for index, token in enumerate(TOKENS)}


class UnknownResidueError(KeyError, ValueError):
    """Text that is no token of ESM-1b: `run` (also `args[0]`, as in fair-esm's KeyError) at `column`, from 1."""

    def __init__(self, run: str, column: int = 1, label: str | None = None):
        super().__init__(run)
        self.run, self.column, self.label = run, column, label

    def __str__(self):
        where = "" if self.label is None else f"sequence {self.label!r}, "
        upper_helps = all(piece in _INDEX for piece in _PIECE.findall(self.run.upper()))
        hint = "write it in upper case" if upper_helps else "X stands for any residue"
        return f"{where}column {self.column}: {self.run!r} is not a residue ESM-1b knows ({hint})"


def encode_definition(text: str) -> list[int]:
    """Token ids of `text`, as fair-esm's `Alphabet.encode`; what the C++ encoder is tested against.

    Raises UnknownResidueError at the first run of unknown characters.
    """
    ids = []
    for piece in _PIECE.finditer(text):
        if piece[0] not in _INDEX:
            raise UnknownResidueError(piece[0], piece.start() + 1)
        ids.append(_INDEX[piece[0]])
    return ids


class Alphabet:
    """The alphabet ESM-1b and ESM-1v share, with the attributes and methods of fair-esm's `Alphabet`."""

    def __init__(self):
        self.standard_toks = list(TOKENS[4:31])
        self.prepend_toks = list(TOKENS[:4])
        self.append_toks = list(TOKENS[32:])
        self.prepend_bos = True
        self.append_eos = True
        self.use_msa = False
        self.all_toks = list(TOKENS)
        self.tok_to_idx = dict(_INDEX)
        self.unk_idx, self.padding_idx, self.cls_idx, self.mask_idx, self.eos_idx = UNK, PAD, CLS, MASK, EOS
        self.all_special_tokens = ["<eos>", "<unk>", "<pad>", "<cls>", "<mask>"]
        self.unique_no_split_tokens = self.all_toks

    @classmethod
    def from_architecture(cls, name: str) -> "Alphabet":
        """The alphabet of "ESM-1b" or "roberta_large", fair-esm's two names for it."""
        if name not in ("ESM-1b", "roberta_large"):
            raise ValueError(f"no alphabet for {name!r}: supported are 'ESM-1b' and 'roberta_large' (ESM-1b, ESM-1v)")
        return cls()

    def __len__(self) -> int:
        return len(TOKENS)

    def get_idx(self, tok: str) -> int:
        return self.tok_to_idx.get(tok, self.unk_idx)

    def get_tok(self, ind: int) -> str:
        return self.all_toks[ind]

    def to_dict(self) -> dict[str, int]:
        return self.tok_to_idx.copy()

    def tokenize(self, text: str) -> list[str]:
        """The tokens of `text`, without white space; a run of unknown characters is one piece, and no error."""
        return _PIECE.findall(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without cls and eos. Raises UnknownResidueError."""
        return _encode((text,), (None,))[0, 1:-1].tolist()

    def get_batch_converter(self, truncation_seq_length: int | None = None) -> "BatchConverter":
        return BatchConverter(self, truncation_seq_length)


class BatchConverter:
    """Called with (label, sequence) pairs; returns labels, sequences, and the tokens: int64 (B, T), padded.

    A row is cls, the first `truncation_seq_length` tokens of the sequence (None or 0: all), eos, padding. The sequences
    come back whole. As in fair-esm, lower-case letters are unknown: UnknownResidueError, which names the label.
    """

    def __init__(self, alphabet: Alphabet, truncation_seq_length: int | None = None):
        if truncation_seq_length is not None and truncation_seq_length < 0:
            raise ValueError(f"truncation_seq_length is {truncation_seq_length}: give a length, or None for no limit")
        self.alphabet = alphabet
        self.truncation_seq_length = truncation_seq_length

    def __call__(self, raw_batch: Sequence[tuple[str, str]]) -> tuple[list[str], list[str], torch.Tensor]:
        try:
            columns = list(zip(*raw_batch, strict=True))
        except TypeError:
            raise TypeError("the batch must be (label, sequence) pairs") from None
        if not columns:
            raise ValueError("the batch is empty: give at least one (label, sequence) pair")
        labels, strings = columns
        return list(labels), list(strings), _encode(strings, labels, self.truncation_seq_length)


def _encode(strings: tuple[str, ...], labels: tuple, limit: int | None = None) -> torch.Tensor:
    """The padded tokens of the strings, int64 (B, T), no more than `limit` of a string (None or 0: all)."""
    for label, string in zip(labels, strings, strict=True):
        if not isinstance(string, str):
            raise TypeError(f"sequence {label!r} is a {type(string).__name__}: sequences are strings")
    ascii_strings = strings if all(map(str.isascii, strings)) else tuple(map(_in_ascii, strings))
    tokens, unknown = _C.encode_texts(ascii_strings, limit or 2**62)
    if unknown:
        row, begin, end = unknown
        raise UnknownResidueError(strings[row][begin:end], begin + 1, labels[row])
    return torch.from_numpy(tokens)


def _in_ascii(text: str) -> str:
    """`text` with the same white space, tokens and unknown runs in the same columns, all ASCII."""
    return "".join(c if c.isascii() else " " if c.isspace() else "?" for c in text)
