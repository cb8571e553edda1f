"""FASTA of random bytes, cut anywhere: the parser gives what its definition gives, or both refuse."""

import io
from collections import Counter
from pathlib import Path
from random import Random

from esm_fast.sequences.fasta import FastaError, parse_definition, read_fasta

from .outcome import RIGHT, WRONG

_PIECES = (
    b">",
    b"\n",
    b"\r",
    b"\r\n",
    b" ",
    b"\t",
    b"M",
    b"k",
    b"*",
    b"-",
    b"<mask>",
    b"\xff",
    b"\xce\xb2",
    b"\0",
    b"a b",
)


def records(count: int, rng: Random, folder: Path) -> Counter:
    outcomes, done = Counter(), 0
    while done < count:
        made = [_record(rng) for _ in range(rng.randrange(1, 400))]
        data = b"\xef\xbb\xbf" * (rng.random() < 0.1) + b"".join(made)
        wanted, got = _of(lambda data=data: parse_definition(data)), _of(lambda data=data: _parsed(data, rng))
        number = len(wanted) if isinstance(wanted, list) else 1
        kind = RIGHT if isinstance(wanted, list) else "refused by both"
        outcomes[kind if wanted == got else WRONG] += number
        done += number
    return outcomes


def _record(rng: Random) -> bytes:
    header = bytes(rng.choices(b"spP0123|_ abc>\xce\xb2\xff\x1b\t", k=rng.randrange(30)))
    body = b"".join(rng.choices(_PIECES[1:], k=rng.randrange(12)))
    plain = bytes(rng.choices(b"ACDEFGHIKLMNPQRSTVWY", k=rng.randrange(60)))
    return b">" + header + rng.choice((b"\n", b"\r\n", b"\r")) + plain + body + b"\n"


def _parsed(data: bytes, rng: Random) -> list:
    return [
        pair for found in read_fasta(io.BytesIO(data), chunk_bytes=rng.choice((1, 7, 64, 1 << 16))) for pair in found
    ]


def _of(read):
    try:
        return read()
    except FastaError:
        return "refused"


ATTACKS = {"random FASTA records, read in pieces": (300_000, records)}
