"""Which proteins of a FASTA file a run takes, and how much of it the peers that pad would waste on padding."""

from pathlib import Path

from common import Proteins, padded_batches, token_counts

MAX_RESIDUES = 1022


def read(path: Path) -> Proteins:
    """Every protein of a FASTA file, cut to the longest ESM-1b takes."""
    from esm_fast.sequences.fasta import read_fasta
    from esm_fast.sequences.names import identifier

    if not path.exists():
        raise SystemExit(f"{path} does not exist; give a FASTA file with --fasta")
    return [(identifier(name), residues[:MAX_RESIDUES]) for records in read_fasta(path) for name, residues in records]


def choose(proteins: Proteins, residues: int, count: int | None, batch_tokens: int) -> Proteins:
    """Part of the file, evenly spaced over its lengths: `count` proteins, or about so many residues in whole batches.

    Whole batches are those of the whole file, and so is their padding; single proteins find fewer of their own length.
    """
    by_length = sorted(proteins, key=lambda protein: (-len(protein[1]), protein[0]))
    groups = [[i] for i in range(len(by_length))]
    if count is None:
        groups = list(padded_batches(list(token_counts(by_length)), batch_tokens))
        count = round(residues * len(groups) / sum(len(protein[1]) for protein in proteins))
    count = min(max(1, count), len(groups))
    chosen = [groups[int((i + 0.5) * len(groups) / count)] for i in range(count)]
    return sorted(by_length[i] for group in chosen for i in group)  # by label: gives no order of lengths away


def single(proteins: Proteins, residues: int) -> Proteins:
    """One protein of exactly so many residues: the shortest that has them, cut."""
    label, sequence = min(proteins, key=lambda protein: (len(protein[1]) < residues, len(protein[1]), protein[0]))
    if len(sequence) < residues:
        raise SystemExit(f"no protein of the file has {residues} residues")
    return [(label, sequence[:residues])]


def padding(proteins: Proteins, batch_tokens: int) -> tuple[int, float]:
    """Batches, and the share of their tokens that is padding, for the peers that pad."""
    lengths = token_counts(proteins)
    batches = list(padded_batches(list(lengths), batch_tokens))
    return len(batches), 1 - lengths.sum() / sum(len(batch) * lengths[batch[0]] for batch in batches)
