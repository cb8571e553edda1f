"""The three sets that bench_finetune.py is measured on, as tables, from files that anybody can have.

    python benches/finetune_sets.py tem1 examples/tem1_activity.fasta.gz -o tem1.csv
    python benches/finetune_sets.py families DB.fasta.gz -o families.csv        # Debian's mmseqs2-examples
    python benches/finetune_sets.py structure swiss/seq.dat -o structure.csv    # Debian's emboss-test

tem1: the activity of the first 900 different variants. families: proteins of at most 399 residues by the name in their
header, names that 17 to 56 of them have. structure: of each residue H (helix), E (strand) or C, between the first and
the last such feature of entries that have four or more.
"""

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from esm_fast.sequences.fasta import read_fasta

VARIANTS = 900
LONGEST, FEWEST, MOST = 399, 17, 56  # residues; proteins of a name
FEATURES = 4


def tem1(path: Path) -> Iterator[tuple[str, str]]:
    seen = {}
    for header, sequence in _records(path):
        seen.setdefault(sequence, header.split("|")[-1])
    yield from list(seen.items())[:VARIANTS]


def families(path: Path) -> Iterator[tuple[str, str]]:
    named = defaultdict(dict)  # name: its different sequences
    for header, sequence in _records(path):
        name = re.sub(r"\s*\(Fragment\)", "", header.split(" OS=")[0].split(" ", 1)[1])
        if len(sequence) <= LONGEST and "ncharacterized" not in name:
            named[name].setdefault(sequence)
    for name in sorted(named):
        if FEWEST <= len(named[name]) <= MOST:
            yield from ((sequence, name) for sequence in named[name])


def structure(path: Path) -> Iterator[tuple[str, str]]:
    for entry in path.read_text().split("\n//\n"):
        found = re.findall(r"^FT   (HELIX|STRAND) +(\d+) +(\d+)", entry, re.MULTILINE)
        if len(found) < FEATURES:
            continue
        sequence = re.sub(r"\s", "", entry.split("\nSQ ")[1].split("\n", 1)[1])
        labels = ["?"] * len(sequence)
        low, high = min(int(start) for _, start, _ in found), max(int(end) for *_, end in found)
        labels[low - 1 : high] = "C" * (high - low + 1)
        for kind, start, end in found:
            labels[int(start) - 1 : int(end)] = ("H" if kind == "HELIX" else "E") * (int(end) - int(start) + 1)
        yield sequence, "".join(labels)


def _records(path: Path) -> Iterator[tuple[str, str]]:
    for records in read_fasta(path):
        yield from records


SETS = {made.__name__: made for made in (tem1, families, structure)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=tuple(SETS))
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    rows = list(SETS[args.set](args.source))
    with args.output.open("w", newline="") as file:
        csv.writer(file).writerows([("sequence", "label"), *rows])
    print(f"{len(rows):,} proteins, {len({label for _, label in rows}):,} different labels")


if __name__ == "__main__":
    main()
