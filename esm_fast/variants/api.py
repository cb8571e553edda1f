"""esm_fast.variants: scores of variants, scans, log-probabilities, pseudo-perplexities."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from os import PathLike

import numpy as np

from ..inference.embed import token_budget
from ..inference.load import load
from .bind import Bound, check, explain, offset_for, require_protein
from .scores import Job

_COMBINE = {"mean": np.mean, "min": np.min}
INVALID = ("error", "nan")


def score(
    model,
    sequence: str,
    variants: Iterable[str],
    *,
    strategy: str = "wt",
    window: str = "auto",
    offset: int | str = 0,
    combine: str = "mean",
    invalid: str = "error",
    compat: bool = False,
    batch_tokens: int | None = None,
    report: Counter | None = None,
    on_batch: Callable[[int], None] = lambda tokens: None,
    **load_options,
) -> np.ndarray:
    """Scores variants of a protein: the lower, the less likely the model finds them (docs/variants.md).

    Args:
        model: from `esm_fast.load`, or a name or path for it; or a list of these, which are loaded one after another
            and held one at a time.
        sequence: the wild type, of any length.
        variants: such as "A1P", "A1P:D2N" (also with , or ;), HGVS "p.Ala1Pro", "p.A3_S5del", "p.Gly4dup",
            "p.H4_Q5insA", "p.Cys28delinsTrpVal", "p.Arg97Ter", "p.=".
        strategy: "wt", "masked", "masked-joint", "mutant" (sums of log p(mutant) - log p(wild type)), "pll" (the log-
            likelihood of the variant's protein; the wild type's is that of "="), "pllr"; or a published name of these.
        window: for proteins of more than 1,022 residues: "optimal", "brandes", "proteingym", "error"; "whole" on models
            without a limit; "auto" takes the one that the strategy was published with.
        offset: position p of a variant is residue p - offset of the sequence, counted from 1; "auto": the offset that
            fits most variants.
        combine: for several models: "mean" or "min" of their columns as one more, or "none".
        invalid: "error" raises for variants that do not fit the protein or have no score under the strategy; "nan".
        compat: reproduce the published scripts' errors (pll: off by one).
        report: a Counter to count into: rows, duplicate, synonymous, wild type, and each kind of invalid row.
        on_batch: is given the tokens computed, after each batch.
        load_options: for models given by name, see `esm_fast.load`.

    Returns:
        float64 (variants,) in the order of the input, in nats; for a list (variants, models + 1), or (variants, models)
        for combine="none". The numbers do not depend on the order, on what else is scored, or on batch_tokens.

    Raises:
        ValueError: for arguments, and with invalid="error" for variants, naming row, position, expected and found
            residue, and the offset that would fit.
    """
    if invalid not in INVALID:
        raise ValueError(f"invalid is {invalid!r}; choose one of {', '.join(INVALID)}")
    protein, texts = require_protein(sequence), _texts(variants)
    offset, job = offset_for(offset, texts, protein), Job(protein, strategy, window, compat=compat)
    checked = check(texts, protein, offset, job.refuse)
    if report is not None:
        report.update(checked.counts)
    if checked.problems and invalid == "error":
        raise ValueError(explain(checked.problems, texts, protein, offset))

    def run(one, budget: int) -> np.ndarray:
        scores = np.append(job.score(one, checked.variants, budget, on_batch), np.nan)
        return scores[checked.of_row]  # the row of a problem has the last one

    return _columns(model, run, combine, batch_tokens, load_options)


def scan(
    model,
    sequence: str,
    *,
    strategy: str = "wt",
    window: str = "auto",
    combine: str = "mean",
    batch_tokens: int | None = None,
    on_batch: Callable[[int], None] = lambda tokens: None,
    **load_options,
) -> np.ndarray:
    """Scores every substitution of a protein; arguments as for `score`.

    Returns:
        float64 (residues, 20): columns ACDEFGHIKLMNPQRSTVWY, less the wild type's, which has 0. For "pll" and "pllr",
        which cost a pass or more a substitution, the difference of the log-likelihoods. For a list of models
        (residues, 20, models + 1), or (residues, 20, models) for combine="none".
    """
    job = Job(require_protein(sequence), strategy, window)
    return _columns(model, lambda one, budget: job.scan(one, budget, on_batch), combine, batch_tokens, load_options)


def log_probs(
    model,
    sequence: str,
    masked: bool | Iterable[int] = False,
    *,
    window: str = "auto",
    batch_tokens: int | None = None,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Log-probabilities at each residue of a protein, over all 33 tokens.

    Args:
        masked: False: nothing is masked; True: each residue in turn, a pass each; or indices of residues, from 0, that
            are masked together.
        window: as for `score`; "auto" is that of "masked" where something is masked, else that of "wt".

    Returns:
        float64 (residues, 33), columns in the order of the alphabet (`model.alphabet.all_toks`).
    """
    job = Job(require_protein(sequence), "wt" if masked is False else "masked", window)
    at = masked if isinstance(masked, bool) else _indices(masked, len(job.text))
    return job.log_probs(model, at, token_budget(model, batch_tokens), on_batch)


def pseudo_perplexity(
    model,
    sequences: Iterable[str],
    *,
    window: str = "auto",
    batch_tokens: int | None = None,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """exp(-mean log p(residue)) of each sequence, each residue masked in turn (Salazar et al. 2020): float64 (n,)."""
    if isinstance(sequences, str):
        raise TypeError("a single string is not a list of sequences: give [sequence]")
    values, budget = [], token_budget(model, batch_tokens)
    for sequence in sequences:
        protein = require_protein(sequence)
        (likelihood,) = Job(protein, "pll", window).score(model, [Bound(())], budget, on_batch)
        values.append(np.exp(-likelihood / len(protein)))
    return np.array(values, dtype=np.float64)


def _texts(variants: Iterable[str]) -> list[str]:
    if isinstance(variants, str):
        raise TypeError("a single string is not a list of variants: give [variant]")
    return list(variants)


def _indices(masked: Iterable[int], residues: int) -> tuple[int, ...]:
    found = tuple(sorted({int(at) for at in masked}))
    if found and not 0 <= found[0] <= found[-1] < residues:
        raise ValueError(
            f"masked names residue {found[0] if found[0] < 0 else found[-1]}; they are 0 to {residues - 1}"
        )
    return found


def _columns(model, run: Callable, combine: str, batch_tokens: int | None, load_options: dict) -> np.ndarray:
    """What `run` gives for the model; or for a list of models stacked, with the combination last."""
    if combine not in (*_COMBINE, "none"):
        raise ValueError(f"combine is {combine!r}; choose one of {', '.join(_COMBINE)}, none")
    several = isinstance(model, (list, tuple))
    if several and not model:
        raise ValueError("the list of models is empty")
    found = [run(one, token_budget(one, batch_tokens)) for one in _opened(model if several else [model], load_options)]
    if not several:
        return found[0]
    if combine != "none":
        found.append(_COMBINE[combine](found, axis=0))
    return np.stack(found, axis=-1)


def _opened(models: Iterable, load_options: dict) -> Iterator:
    """Loads those that are names or paths, each when its turn comes; nothing here holds it longer than that."""
    for one in models:
        yield load(one, **load_options)[0] if isinstance(one, (str, PathLike)) else one
