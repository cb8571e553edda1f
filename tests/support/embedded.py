"""What the tests of data sets share: input, and what is in the files."""

import hashlib
import random

import pyarrow.parquet as pq

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def proteins(count, seed=0, longest=50):
    rng = random.Random(seed)
    return [(f"p{i}", "".join(rng.choices(RESIDUES, k=rng.randint(1, longest)))) for i in range(count)]


def fasta_of(data):
    return "".join(f">{label} some protein\n{sequence}\n" for label, sequence in data)


# A duplicate id, a duplicate sequence, one that lacks residues and one with a letter that is none.
MIXED = """\
>sp|P69905|HBA_HUMAN Hemoglobin
MVLSPADKTNVKAAWGKVG
>same as the first
mvlspadktn vkaawgkvg*
>bad
MKJV
>none
>tr|A0A024|X
MKTAYIAKQR
>P69905
MK<mask>V
>last
MVLSPADKTNVKAAWGKVG
"""


def contents(folder):
    """Every file that is not for a run's own use -> its SHA-256."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def pooled(folder):
    return [row for path in sorted((folder / "pooled").iterdir()) for row in pq.read_table(path).to_pylist()]


def read(path):
    return pq.read_table(path).to_pylist()
