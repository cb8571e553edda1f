"""Command lines whose input, table, recipe, model, numbers or device are broken at random: one line, no traceback."""

import gzip
from collections import Counter
from pathlib import Path
from random import Random

from esm_fast.dataset import compute, planner, verify, worker  # noqa: F401, or each fork would import them

from .outcome import of_command

_FASTA = ">sp|P1|A_X first\nMKTVRQERLK\n>b\x1b[31m\nKALTARQQEVF\n"
_GOOD = {
    "in.fa": _FASTA.encode(),
    "in.fa.gz": gzip.compress(_FASTA.encode()),
    "t.csv": b"sequence,label\n" + b"".join(b"MKTV%s,%d\n" % (b"K" * i, i) for i in range(12)),
    "v.csv": b"mutant\nM1A\nK2R\n",
    "c.tsv": b"P1\tP1\nP1\tb\n",
    "r.yaml": b"model: {layers: 1, embed_dim: 16, ffn_embed_dim: 32, attention_heads: 2}\nstore: s\noutput: o",
}
_LINES = (
    "embed in.fa -o o.h5", "embed in.fa.gz -o o.h5 --pool per-residue", "embed in.fa in.fa.gz -o set",
    "contacts in.fa -o o.npz", "extract esm1b_t6_demo in.fa o --include mean", "fill-mask M<mask>K",
    "variants in.fa -o o.csv --variants v.csv", "variants in.fa -o o.csv", "info v.csv", "convert t.csv o.safetensors",
    "prepare in.fa -o store --clusters c.tsv", "finetune t.csv -o o --task regression --epochs 1", "pretrain r.yaml",
    "verify set", "finish set", "export set --to npy -o o.npy", "search set P1", "search set in.fa",
    "map set -o o.html", "warmup", "variants set --lookup P1",
)  # fmt: skip
_NUMBERS = ("nan", "inf", "1e400", "-1", "0", "1", "2147483647", "9" * 25, "x", "", "\x1b[31m", "1.5", "-0")
_OPTIONS = (
    "--batch-tokens", "--threads", "--layers", "--layer", "-k", "--max-record", "--unit-residues",
    "--valid-share", "--epochs",
    "--learning-rate", "--seed", "--rank", "--top", "--offset", "--shard", "--device", "--dtype",
    "--model", "--backend",
)  # fmt: skip


def _broken(data: bytes, rng: Random) -> bytes:
    at, how = rng.randrange(len(data) + 1), rng.randrange(6)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:]
    if how == 2:
        return data[:at] + rng.choice((b"\0", b"\xff", b"\x1b]0;x\x07", b'"', b"\r", b">", b",,,,", b": [")) + data[at:]
    if how == 3:
        return rng.choice(
            (b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n", b"[" * 99_999, data * 3, b"\n" * 99)
        )
    if how == 4 and data:
        return bytes([*data[: at - 1], data[at - 1] ^ (1 << rng.randrange(8)), *data[at:]]) if at else data
    return data


def commands(count: int, rng: Random, folder: Path) -> Counter:
    outcomes = Counter()
    for name, data in _GOOD.items():
        (folder / name).write_bytes(data)
    of_command(["embed", f"{folder}/in.fa", "-o", f"{folder}/set"])
    for number in range(count):
        line = rng.choice(_LINES).split(" ")
        for word in _GOOD:
            (folder / word).write_bytes(_broken(_GOOD[word], rng) if word in line else _GOOD[word])
        if rng.random() < 0.5:
            line += [rng.choice(_OPTIONS), rng.choice(_NUMBERS)]
        words = [_placed(word, folder, number, rng) for word in line]
        outcomes[of_command(words)] += 1
    return outcomes


def _placed(word: str, folder: Path, number: int, rng: Random) -> str:
    """Files in the folder, outputs under a name of their own; sometimes what is not there."""
    if word in _GOOD or word == "set":
        return str(folder / (word if rng.random() < 0.95 else f"missing\x1b[31m{word}"))
    if word == "store" or word.startswith("o.") or word == "o":
        return str(folder / f"out{number}{word}")
    return word


ATTACKS = {"command lines with broken inputs and options": (400, commands)}
