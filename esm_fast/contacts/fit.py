"""The regression of Rao et al. 2020: L1 logistic, of contacts on symmetrised, APC-corrected attention maps."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from ..alphabet import TOKENS
from ..sequences.batching import pack
from .structures import Structure

LEAST_APART = 6  # residues along the chain: what is closer touches anyway
_SEED = 0


class Regression(NamedTuple):
    """weight: (layers * heads,) float64, layer by layer; bias: of the log-odds. pairs, contacts: fitted on."""

    weight: np.ndarray
    bias: float
    pairs: int
    contacts: int


@torch.inference_mode()
def features(model, sequence: str) -> np.ndarray:
    """(residues, residues, layers * heads) float32: each attention map A as S = A + A^T, less its average product."""
    ids = np.array([TOKENS.index(letter) for letter in sequence])
    batch = pack(ids, np.array([0]), np.array([len(ids)]), np.array([0])).to(model.device)
    (maps,) = model.forward_packed(batch, attentions=True).attentions
    maps = maps.flatten(0, 1)[:, 1:-1, 1:-1].float()
    maps = maps + maps.transpose(1, 2)
    sums = maps.sum(2)
    maps -= sums[:, :, None] * sums[:, None, :] / sums.sum(1)[:, None, None]
    return maps.permute(1, 2, 0).cpu().numpy()


def pairs_of(structure: Structure) -> tuple[np.ndarray, np.ndarray]:
    """Indices i < j of the pairs that were seen, at least 6 residues apart."""
    first, second = np.triu_indices(len(structure.sequence), LEAST_APART)
    seen = structure.seen[first] & structure.seen[second]
    return first[seen], second[seen]


def fit(model, structures: Iterable[Structure], c: float = 0.15, most_pairs: int = 200_000) -> Regression:
    """Fits the regression; about 20 structures are enough (Rao et al. 2020, which c is from too).

    Args:
        c: the inverse of the L1 penalty, as scikit-learn's LogisticRegression takes it.
        most_pairs: if there are more, all contacts stay, the others are drawn from, and the bias is corrected for it.

    Raises ValueError where no pair, or each one, is a contact, and where every coefficient becomes 0.
    Needs scikit-learn (the extra `contacts`).
    """
    structures = list(structures)
    total = sum(len(pairs_of(structure)[0]) for structure in structures)
    share, choose, rows, truths = min(1.0, most_pairs / max(total, 1)), np.random.default_rng(_SEED), [], []
    for structure in structures:
        first, second = pairs_of(structure)
        truth = structure.contacts[first, second]
        kept = truth | (choose.random(len(truth)) < share)
        rows.append(features(model, structure.sequence)[first[kept], second[kept]])
        truths.append(truth[kept])
    x, y = np.concatenate(rows), np.concatenate(truths)
    if y.all() or not y.any():
        raise ValueError("the structures have no pair that touches, or none that does not: nothing can be fitted")
    weight, bias = _logistic(x, y, c)
    if not weight.any():
        raise ValueError(
            f"no attention map tells which residues touch: at c={c:g} every coefficient is 0; give more structures, or "
            "a larger c (--c)"
        )
    return Regression(weight, bias + float(np.log(share)), total, int(y.sum()))


def _logistic(x: np.ndarray, y: np.ndarray, c: float) -> tuple[np.ndarray, float]:
    import sklearn
    from sklearn.linear_model import LogisticRegression

    new = tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8)
    fitted = LogisticRegression(**({"l1_ratio": 1} if new else {"penalty": "l1"}), C=c, solver="liblinear",
                                random_state=_SEED).fit(x, y)  # fmt: skip
    return fitted.coef_[0], float(fitted.intercept_[0])
