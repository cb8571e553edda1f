"""What a model has learned of proteins: held-out perplexity beside its walls, filled masks, and substitutions.

    python benches/language.py                                     # the model that ships, on proteins it never saw
    python benches/language.py --model esm1b_t33_650M_UR50S --fasta proteins.fasta.gz --out out/language

15 % of each protein's residues are shown as <mask>, all of them: no noise, no clean residue, so that the wall is the
perplexity of the residues' frequencies. Shuffled proteins have the same composition and no order; random ones have
neither. A model that has learned no more than composition is as good on shuffled proteins as on real ones.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tables import aligned

from esm_fast.alphabet import MASK, TOKENS
from esm_fast.sequences.batching import pack, plan

HELD_OUT = Path(__file__).parents[1] / "examples" / "held_out_sample.fasta.gz"
AMINO_ACIDS = "ARNDCQEGHILKMFPSTWYV"  # in BLOSUM62's order
_FIRST, _LAST = TOKENS.index("L"), TOKENS.index("C")  # their ids, without a gap
# Henikoff and Henikoff (1992), the lower triangle without its diagonal: R to A, N to A and R, ...
BLOSUM62 = """
-1
-2 0
-2 -2 1
0 -3 -3 -3
-1 1 0 0 -3
-1 0 0 2 -4 2
0 -2 0 -1 -3 -2 -2
-2 0 1 -1 -3 0 0 -2
-1 -3 -3 -3 -1 -3 -3 -4 -3
-1 -2 -3 -4 -1 -2 -3 -4 -3 2
-1 2 0 -1 -3 1 1 -2 -1 -3 -2
-1 -1 -2 -3 -1 0 -2 -3 -2 1 2 -1
-2 -3 -3 -3 -2 -3 -3 -3 -1 0 0 -3 0
-1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4
1 -1 1 0 -1 0 0 0 -1 -2 -2 0 -1 -2 -1
0 -1 0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1 1
-3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1 1 -4 -3 -2
-2 -2 -2 -3 -2 -1 -2 -3 2 -1 -1 -2 -1 3 -3 -2 -2 2
0 -3 -3 -3 -1 -2 -2 -3 -3 3 1 -2 1 -1 -2 -2 0 -3 -1
"""


@dataclass(frozen=True)
class Predictions:
    """Of n masked residues: which they were, their log-probabilities over the alphabet, and those of their kinds."""

    residues: np.ndarray  # token ids (n,)
    log_p: np.ndarray  # float32 (n, tokens)

    @property
    def perplexity(self) -> float:
        return float(np.exp(-self.log_p[np.arange(len(self.residues)), self.residues].mean()))

    @property
    def accuracy(self) -> float:
        """How often the most probable residue is the true one."""
        return float((self.log_p.argmax(1) == self.residues).mean())

    @property
    def wall(self) -> float:
        """The perplexity of the best guess that knows nothing of the context: the frequencies of these residues."""
        share = np.bincount(self.residues) / len(self.residues)
        return float(np.exp(-np.log(share[self.residues]).mean()))

    @property
    def most_common(self) -> float:
        """How often a guess is right that always names the most common residue."""
        return float(np.bincount(self.residues).max() / len(self.residues))


def encode(proteins: Sequence[tuple[str, str]], longest: int) -> list[np.ndarray]:
    """Ids of the 20 amino acids' runs, cut to the longest a model takes; proteins with other letters are left out."""
    ids = {letter: TOKENS.index(letter) for letter in AMINO_ACIDS}
    return [np.array([ids[x] for x in seq[:longest]]) for _, seq in proteins if set(seq) <= set(AMINO_ACIDS) and seq]


def shuffled(proteins: Sequence[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(protein) for protein in proteins]


def random(proteins: Sequence[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(_FIRST, _LAST + 1, len(protein)) for protein in proteins]


@torch.inference_mode()
def predict(model, proteins: Sequence[np.ndarray], *, share: float = 0.15, seed: int = 0) -> Predictions:
    """Masks the same places in proteins of the same lengths, whatever they hold."""
    rng = np.random.default_rng(seed)
    chosen = [rng.random(len(protein)) < share for protein in proteins]
    lengths = np.array([len(protein) for protein in proteins], np.int32)
    residues, log_p = [], []
    for batch in plan(lengths + 2, 4096):
        shown = [np.where(chosen[i], MASK, proteins[i]).astype(np.uint8) for i in batch]
        sizes = lengths[batch]
        packed = pack(np.concatenate(shown), np.cumsum(sizes) - sizes, sizes, np.arange(len(batch)))
        rows = np.concatenate([np.pad(chosen[i], 1) for i in batch])
        logits = model.forward_packed(packed.to(model.device), logits=True).logits[torch.from_numpy(rows)]
        log_p.append(logits.float().log_softmax(-1).cpu().numpy())
        residues += [proteins[i][chosen[i]] for i in batch]
    return Predictions(np.concatenate(residues), np.concatenate(log_p))


def substitutions(predictions: Predictions) -> np.ndarray:
    """(20, 20): the mean log-odds, over its frequency, that the model gives b where a stood; both ways averaged."""
    ids = np.array([TOKENS.index(letter) for letter in AMINO_ACIDS])
    share = np.array([(predictions.residues == i).mean() for i in ids])
    mean = np.stack([predictions.log_p[predictions.residues == i][:, ids].mean(0) for i in ids])
    odds = mean - np.log(share)
    return (odds + odds.T) / 2


def blosum62() -> np.ndarray:
    """(20, 20), its diagonal 0."""
    matrix = np.zeros((20, 20))
    matrix[np.tril_indices(20, -1)] = np.array(BLOSUM62.split(), float)
    return matrix + matrix.T


def likeness(one: np.ndarray, other: np.ndarray, permutations: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Spearman's correlation of two matrices off their diagonals, and the share of permutations of the amino acids that
    reach it (Mantel 1967)."""
    below = np.tril_indices(len(one), -1)
    target = _ranks(other[below])

    def correlation(matrix):
        return float(np.corrcoef(_ranks(matrix[below]), target)[0, 1])

    found, rng = correlation(one), np.random.default_rng(seed)
    orders = (rng.permutation(len(one)) for _ in range(permutations))
    reached = sum(correlation(one[order][:, order]) >= found for order in orders)
    return found, (reached + 1) / (permutations + 1)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equal values share their mean rank."""
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - (size - 1) / 2)[group]


def report(model, proteins: Sequence[np.ndarray]) -> dict:
    real, *others = (predict(model, kind) for kind in (proteins, shuffled(proteins), random(proteins)))
    spearman, p = likeness(substitutions(real), blosum62())
    return {
        "proteins": len(proteins),
        "masked residues": len(real.residues),
        "perplexity": real.perplexity,
        "wall: frequencies": real.wall,
        "shuffled": others[0].perplexity,
        "random": others[1].perplexity,
        "filled correctly": real.accuracy,
        "most common residue": real.most_common,
        "BLOSUM62, Spearman": spearman,
        "BLOSUM62, p": p,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="esm1b_t6_demo", help="as for esm-fast (default: %(default)s)")
    parser.add_argument("--fasta", type=Path, default=HELD_OUT, help="proteins (default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="as for esm-fast (default: float32)")
    parser.add_argument("--out", type=Path, help="also write PREFIX.json")
    args = parser.parse_args(argv)
    import esm_fast
    from esm_fast.sequences.fasta import read_fasta

    records = [record for group in read_fasta(args.fasta) for record in group]
    rows = []
    for dtype in args.dtype:
        model, _ = esm_fast.load(args.model, dtype=dtype)
        rows.append({"dtype": dtype} | report(model, encode(records, model.config.max_residues)))
    print(aligned([[name, *(_text(row[name]) for row in rows)] for name in rows[0]]))
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(rows, indent=2))
    return 0


def _text(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
