"""FASTA files to a token store: tokenised, without exact duplicates, and split into training and validation records.

Two passes, so that memory holds about a hundred bytes a record and never the residues: the first tokenises into a
spool and hashes each record, the second copies what is kept.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from ..files.atomic import atomic_folder
from ..sequences.compression import DamagedStreamError, Decompressed
from ..sequences.fasta import MAX_RECORD, FastaError
from ..sequences.ingest import Counts, Ingest
from ..sequences.names import accession, identifier
from ..sequences.tokenize import Policy, Report, Tokens
from . import store

_COPY_TOKENS = 1 << 24
_NEVER = 2**64 - 1  # the hash of what is not held out


@dataclass
class Summary:
    """What became of the records: all were kept for training or validation, or skipped and counted."""

    counted: Counts = field(default_factory=Counts)
    duplicates: int = 0  # records skipped for being equal to an earlier one
    train: int = 0
    valid: int = 0
    train_residues: int = 0
    valid_residues: int = 0

    @property
    def report(self) -> Report:
        return self.counted.report

    def counts(self) -> dict:
        """As store.json has it."""
        numbers = asdict(self)
        report = numbers.pop("counted")["report"]
        return {**report, "special": report.pop("specials"), **numbers} | {"skipped": self.report.skipped}


def prepare(
    sources: Iterable,
    out: str | Path,
    *,
    policy: Policy,
    valid_share: float = 0.01,
    valid: Iterable = (),
    clusters: dict[str, str] | None = None,
    max_record: int = MAX_RECORD,
    progress: Callable[[int], None] = lambda residues: None,
    on_stage: Callable[[str, int], None] = lambda stage, residues: None,
    on_copied: Callable[[int], None] = lambda residues: None,
) -> Summary:
    """Makes the store `out`, a folder that appears only when it is complete.

    Args:
        sources: what `read_fasta` takes.
        policy: of unknown residues and empty records; long proteins are kept whole and cropped anew each epoch.
        valid_share: of the sequences (of the clusters, where these are given) that are held out. A hash of the sequence
            (of the cluster's name) decides, so equal input is split equally, whatever its order.
        valid: what `read_fasta` takes: records that are held out, in the place of a share of the sources. A source's
            record that is equal to one of them is a duplicate, and is left out.
        clusters: record id -> name of its cluster (see `read_clusters`); a cluster is never divided. Without them a
            protein held out may have close relatives in training.
        progress: is told the residues of each batch that is read. on_stage: then, that writing begins, and of how many;
            on_copied: those of each piece that is written.

    Raises:
        FastaError, FileExistsError, ValueError.
    """
    if not 0 <= valid_share < 1:
        raise ValueError(f"the share held out is {valid_share}; give 0 or more, less than 1")
    if valid and clusters is not None:
        raise ValueError("give clusters or records that are held out, not both")
    summary = Summary()
    with atomic_folder(Path(out)) as folder:
        spool = _Spool(folder, summary, clusters, progress)
        policy = replace(policy, specials="skip")  # no protein holds a literal <mask>
        ingest = Ingest(policy, id_of=identifier, duplicates="ignore", max_record=max_record)
        spool.add(valid, ingest, held_out=True)
        spool.add(sources, ingest, held_out=False if valid else None)
        kept = spool.copy(valid_share, on_stage, on_copied)
        if not kept:
            raise FastaError(f"no record is left: all {summary.report.records} were skipped")
        store.describe(folder, summary.counts())
    return summary


def read_clusters(path: str | Path) -> dict[str, str]:
    """A two-column table, cluster and member, tab-separated, as `mmseqs createtsv` writes it -> member: cluster.

    Plain or compressed as FASTA may be; empty lines are passed over. Raises ValueError naming the line.
    """
    clusters = {}
    with open(path, "rb") as stream:
        try:
            text = io.TextIOWrapper(io.BufferedReader(Decompressed(stream)), encoding="utf-8")
            for number, line in enumerate(text, start=1):
                columns = line.rstrip("\r\n").split("\t")
                if len(columns) < 2 and columns != [""]:
                    raise ValueError(f"line {number} has no tab: expected a cluster's name and a member's")
                if columns != [""]:
                    clusters[columns[1]] = columns[0]
        except (ValueError, DamagedStreamError) as error:
            raise ValueError(f"{path}: {error}") from None
    if not clusters:
        raise ValueError(f"{path} holds no cluster; give a table with two columns, cluster and member")
    return clusters


class _Spool:
    """All records in files, and an 8-byte hash of each in memory."""

    def __init__(self, folder: Path, summary: Summary, clusters, progress):
        self.folder, self.summary = folder, summary
        self.clusters, self.progress = clusters, progress
        self.given = False  # whether it is said which records are held out
        self.lengths, self.hashes, self.chances = [], [], []
        for name in ("spool", "spooled_names"):
            (folder / name).touch()

    def add(self, sources: Iterable, ingest: Ingest, held_out: bool | None) -> None:
        """held_out: whether they are, or None where the share decides."""
        with (
            (self.folder / "spool").open("ab") as tokens_file,
            (self.folder / "spooled_names").open("a", encoding="utf-8") as names_file,
        ):
            for batch in ingest.read(sources, self.summary.counted):
                tokens = batch.tokens
                pieces = [tokens.ids[a:b].tobytes() for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]
                hashes = np.array([_hash(piece) for piece in pieces], dtype=np.uint64)
                tokens_file.write(tokens.ids)
                names_file.writelines(name + "\n" for name in batch.ids)
                self.lengths.append(tokens.lengths)
                self.hashes.append(hashes)
                chances = hashes if self.clusters is None else self._cluster_hashes(tokens)
                self.chances.append(chances if held_out is None else np.full_like(hashes, 0 if held_out else _NEVER))
                self.given |= held_out is not None
                self.progress(len(tokens.ids))

    def _cluster_hashes(self, tokens: Tokens) -> np.ndarray:
        hashes = []
        for header in tokens.headers:
            cluster = self.clusters.get(identifier(header)) or self.clusters.get(accession(header))
            if cluster is None:
                raise ValueError(f"the protein {identifier(header)!r} is in no cluster of the table")
            hashes.append(_hash(cluster.encode()))
        return np.array(hashes, dtype=np.uint64)

    def copy(self, valid_share: float, on_stage: Callable, on_copied: Callable) -> int:
        """Writes the store's files of the records that are no duplicates; returns how many."""
        lengths, hashes, chances = (_joined(x) for x in (self.lengths, self.hashes, self.chances))
        if not len(lengths):
            return 0
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        spool = np.memmap(self.folder / "spool", np.uint8, "r")
        keep = ~_duplicates(spool, offsets, hashes.astype(np.uint64))
        if self.given:
            valid = chances[keep] == 0
        else:
            valid = (chances[keep].astype(np.uint64) >> np.uint64(11)) * 2.0**-53 < valid_share
        on_stage("writing", len(spool))
        with (self.folder / "tokens").open("wb") as file:
            for begin, end in _blocks(offsets):
                piece = spool[offsets[begin] : offsets[end]]
                file.write(piece[np.repeat(keep[begin:end], lengths[begin:end])])
                on_copied(len(piece))
        np.concatenate([[0], np.cumsum(lengths[keep])]).astype("<i8").tofile(self.folder / "offsets")
        valid.astype("<u1").tofile(self.folder / "valid")
        if self.clusters is not None:
            self._write_clusters(chances[keep], valid)
        with (
            (self.folder / "spooled_names").open(encoding="utf-8") as names,
            (self.folder / "names.txt").open("w", encoding="utf-8") as file,
        ):
            file.writelines(name for name, kept in zip(names, keep, strict=True) if kept)
        del spool
        (self.folder / "spool").unlink()
        (self.folder / "spooled_names").unlink()
        self._count(lengths[keep], valid, int((~keep).sum()))
        return int(keep.sum())

    def _write_clusters(self, hashes: np.ndarray, valid: np.ndarray) -> None:
        """The records for training, cluster by cluster; clusters are those of equal hashes of their names."""
        train = np.flatnonzero(~valid)
        members = train[np.argsort(hashes[train], kind="stable")]
        ranked = hashes[members]
        begins = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]])) if len(members) else []
        members.astype("<i8").tofile(self.folder / "members")
        np.append(begins, len(members)).astype("<i8").tofile(self.folder / "clusters")

    def _count(self, lengths: np.ndarray, valid: np.ndarray, duplicates: int) -> None:
        summary = self.summary
        summary.duplicates, summary.valid, summary.train = duplicates, int(valid.sum()), int((~valid).sum())
        summary.valid_residues, summary.train_residues = int(lengths[valid].sum()), int(lengths[~valid].sum())


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _duplicates(tokens: np.ndarray, offsets: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Which records are equal to an earlier one. Equal hashes are only candidates: their bytes are compared."""
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    ends = np.append(starts[1:], len(order))
    duplicate = np.zeros(len(order), dtype=bool)
    several = ends - starts > 1
    for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
        seen = set()
        for record in order[start:end].tolist():
            content = tokens[offsets[record] : offsets[record + 1]].tobytes()
            duplicate[record] = content in seen
            seen.add(content)
    return duplicate


def _blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Consecutive records of about _COPY_TOKENS tokens together."""
    begin, records = 0, len(offsets) - 1
    while begin < records:
        end = int(np.searchsorted(offsets, offsets[begin] + _COPY_TOKENS, side="right")) - 1
        end = min(max(end, begin + 1), records)
        yield begin, end
        begin = end
