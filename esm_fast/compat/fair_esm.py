"""What code written against fair-esm imports beside the models: its data set, and the models' classes by its names.

The classes themselves, such as `ProteinBertModel`, are made in `models/padded.py`, one a family; found here by name.
"""

from ..models import padded
from ..sequences.fasta import read_fasta


def __getattr__(name: str):
    if (found := padded.classes().get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


class FastaBatchedDataset:
    """fair-esm's data set of (label, sequence) pairs, for code written against it; `esm_fast.embed` needs none."""

    def __init__(self, sequence_labels, sequence_strs):
        self.sequence_labels = list(sequence_labels)
        self.sequence_strs = list(sequence_strs)
        if len(set(self.sequence_labels)) < len(self.sequence_labels):
            twice = next(label for label in self.sequence_labels if self.sequence_labels.count(label) > 1)
            raise ValueError(f"Found duplicate sequence labels: {twice!r}")

    @classmethod
    def from_file(cls, fasta_file) -> "FastaBatchedDataset":
        """Reads a whole FASTA file into memory, compressed or not; residues are upper-cased."""
        records = [record for chunk in read_fasta(fasta_file) for record in chunk]
        return cls(*zip(*records, strict=True))

    def __len__(self) -> int:
        return len(self.sequence_labels)

    def __getitem__(self, index) -> tuple[str, str]:
        return self.sequence_labels[index], self.sequence_strs[index]

    def get_batch_indices(self, toks_per_batch: int, extra_toks_per_seq: int = 0) -> list[list[int]]:
        """Batches of indices, shortest first, whose padded size stays within toks_per_batch (or of one sequence)."""
        lengths = [len(sequence) + extra_toks_per_seq for sequence in self.sequence_strs]
        batches: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
            if not batches or lengths[index] * (len(batches[-1]) + 1) > toks_per_batch:
                batches.append([])
            batches[-1].append(index)
        return batches
