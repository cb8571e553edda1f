"""esm_fast.variants: scores of variants, scans, log-probabilities, pseudo-perplexities."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from operator import or_
from os import PathLike

import numpy as np

from ..inference.embed import token_budget
from ..inference.load import load
from .bind import WILD_TYPE, check, explain, offset_for, require_protein
from .plan import Known
from .scores import Asked, Job, scores_of

_COMBINE = {"mean": np.mean, "min": np.min}
INVALID = ("error", "nan")


def score(
    model,
    sequence: str,
    variants: Iterable[str],
    *,
    strategy: str | Sequence[str] = "wt",
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
            Or a list of them: contexts that several want are computed once.
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
        for combine="none". For a list of strategies an array of these, one each, in front. The numbers do not depend on
        the order, on what else is scored, or on batch_tokens.

    Raises:
        ValueError: for arguments, and with invalid="error" for variants, naming row, position, expected and found
            residue, and the offset that would fit.
    """
    if invalid not in INVALID:
        raise ValueError(f"invalid is {invalid!r}; choose one of {', '.join(INVALID)}")
    protein, texts = require_protein(sequence), _texts(variants)
    offset = offset_for(offset, texts, protein)
    jobs = _jobs(protein, strategy, window, compat)
    checked = [check(texts, protein, offset, job.refuse) for job in jobs]
    if report is not None:
        report.update(reduce(or_, (each.counts for each in checked)))
    for each in checked:
        if each.problems and invalid == "error":
            raise ValueError(explain(each.problems, texts, protein, offset))
    asked = [Asked(job, each.variants) for job, each in zip(jobs, checked, strict=True)]

    def run(one, budget: int) -> np.ndarray:
        found = (np.append(scores, np.nan) for scores in scores_of(one, asked, budget, on_batch))
        rows = [scores[each.of_row] for scores, each in zip(found, checked, strict=True)]  # a problem has the last one
        return rows[0] if isinstance(strategy, str) else np.stack(rows)

    return _columns(model, run, combine, batch_tokens, load_options)


def scan(
    model,
    sequence: str,
    *,
    strategy: str | Sequence[str] = "wt",
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
        (residues, 20, models + 1), or (residues, 20, models) for combine="none"; for a list of strategies an array of
        these, one each, in front.
    """
    jobs = _jobs(require_protein(sequence), strategy, window)

    def run(one, budget: int) -> np.ndarray:
        known = Known()
        found = [job.scan(one, budget, on_batch, known) for job in jobs]
        return found[0] if isinstance(strategy, str) else np.stack(found)

    return _columns(model, run, combine, batch_tokens, load_options)


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
    asked = [Asked(Job(require_protein(sequence), "pll", window), [WILD_TYPE]) for sequence in sequences]
    likelihoods = scores_of(model, asked, token_budget(model, batch_tokens), on_batch)
    values = [np.exp(-likelihood[0] / len(job.text)) for likelihood, (job, _) in zip(likelihoods, asked, strict=True)]
    return np.array(values, dtype=np.float64)


def _jobs(protein: str, strategy: str | Sequence[str], window: str, compat: bool = False) -> list[Job]:
    if not isinstance(strategy, Iterable):
        raise TypeError(f"strategy must be a name or a list of names, not {type(strategy).__name__}")
    names = [strategy] if isinstance(strategy, str) else list(strategy)
    if not names:
        raise ValueError("the list of strategies is empty")
    return [Job(protein, name, window, compat=compat) for name in names]


def _texts(variants: Iterable[str]) -> list[str]:
    if isinstance(variants, str):
        raise TypeError("a single string is not a list of variants: give [variant]")
    if not isinstance(variants, Iterable):
        raise TypeError(f"variants must be a list of strings, not {type(variants).__name__}")
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
