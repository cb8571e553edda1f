"""FASTA files under the policies: read once to check and count everything, and again to compute."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..sequences.fasta import FastaError, Records, read_fasta
from ..sequences.names import Names, accession
from ..sequences.tokenize import SKIPPED_LISTED, Policy, Report, Tokens, tokenize
from .common import InputError, as_flags


class Label(str):
    """A record's header, and the name it is stored under."""

    name: str


@dataclass
class Counts:
    """Of one reading: records = proteins + every kind of skipped."""

    report: Report = field(default_factory=Report)
    proteins: int = 0  # to compute, or computed
    residues: int = 0  # of these
    squares: int = 0  # of their lengths, summed: the cells of all contact maps
    renamed: int = 0  # duplicates that were kept
    dropped: int = 0  # duplicates that were not
    done: int = 0  # left out because their result is there already

    def count(self, lengths: np.ndarray) -> None:
        self.proteins += len(lengths)
        self.residues += int(lengths.sum())
        self.squares += int((lengths**2).sum())


class Source:
    """FASTA paths ("-" is standard input), as often as they are needed: what cannot be read twice is kept on disk.

    Args:
        safe: what makes an id a name, one of sequences.names. id_of: what makes a header an id.
        duplicates: "keep", "skip" or "error". done: whether the result of a name is there already.
        advice: the library's message about bad input -> the command's.
    """

    def __init__(
        self,
        paths: list[str],
        policy: Policy,
        *,
        safe: Callable[[str], str],
        id_of: Callable[[str], str] = accession,
        duplicates: str = "keep",
        done: Callable[[str], bool] = lambda name: False,
        advice: Callable[[str], str] = as_flags,
    ):
        self.paths, self.policy, self.duplicates = paths, policy, duplicates
        self.safe, self.id_of, self.done, self.advice = safe, id_of, done, advice

    def __enter__(self):
        with ExitStack() as stack:
            self.inputs = [path if Path(path).is_file() else stack.enter_context(_Spool(path)) for path in self.paths]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def scan(self) -> Counts:
        """Reads everything once: raises what there is to raise, before anything is computed."""
        counts = Counts()
        for _ in self.tokens(counts):
            pass
        if not counts.proteins and not counts.done:
            raise InputError(f"nothing is left to compute: all {counts.report.records} records were skipped")
        return counts

    def tokens(self, counts: Counts) -> Iterator[Tokens]:
        """The proteins, their headers as Labels. The generator counts into `counts`."""
        names = Names(self.safe)
        for source in self.inputs:
            try:
                if isinstance(source, _Spool):
                    source.file.seek(0)
                for records in read_fasta(source):
                    tokens = self._named(tokenize(records, self.policy, counts.report), names, records, counts)
                    counts.count(tokens.lengths)
                    yield tokens
            except FastaError as error:
                raise InputError(self.advice(str(error))) from None

    def _named(self, tokens: Tokens, names: Names, records: Records, counts: Counts) -> Tokens:
        labels, keep = [], np.ones(len(tokens), dtype=bool)
        for i, (header, number) in enumerate(zip(tokens.headers, tokens.numbers.tolist(), strict=True)):
            label, wanted = Label(header), self.id_of(header)
            if not names.is_new(wanted):
                if self.duplicates == "error":
                    line = records.lines[number - records.first]
                    raise InputError(
                        f"{records.source}: record {number + 1} (line {line}): the id {wanted!r} was there before; use "
                        "--duplicates keep to store it under another name, or --duplicates skip to leave it out"
                    )
                if self.duplicates == "skip":
                    keep[i] = False
                    counts.dropped += 1
                    _list_skipped(counts.report, number, wanted, "duplicate")
                    continue
                counts.renamed += 1
            label.name = names.give(wanted)
            if self.done(label.name):
                keep[i] = False
                counts.done += 1
                continue
            labels.append(label)
        return Tokens(labels, *_subset(tokens, keep))


def _list_skipped(report: Report, number: int, name: str, reason: str) -> None:
    if len(report.skipped) < SKIPPED_LISTED:
        report.skipped.append((number, name, reason))


def _subset(tokens: Tokens, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """numbers, ids and offsets of the records to keep."""
    if keep.all():
        return tokens.numbers, tokens.ids, tokens.offsets
    offsets = np.concatenate([[0], np.cumsum(tokens.lengths[keep], dtype=np.int64)])
    return tokens.numbers[keep], tokens.ids[np.repeat(keep, tokens.lengths)], offsets


class _Spool:
    """Standard input, or a pipe, copied to a temporary file."""

    def __init__(self, path: str):
        self.name = "<stdin>" if path == "-" else path
        self.path = path

    def __enter__(self):
        self.file = tempfile.TemporaryFile()
        try:
            if self.path == "-":
                shutil.copyfileobj(sys.stdin.buffer, self.file)
            else:
                with open(self.path, "rb") as pipe:
                    shutil.copyfileobj(pipe, self.file)
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self, size: int) -> bytes:
        return self.file.read(size)
