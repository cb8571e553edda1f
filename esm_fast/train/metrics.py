"""How good predictions are, by scikit-learn, with bootstrap intervals over proteins (Efron and Tibshirani 1993)."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from .targets import Target, Targets

_RESAMPLES = 200
_INTERVAL = (2.5, 97.5)  # percentiles


def quick(targets: Targets, outputs: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """The one number a column that progress is told by: accuracy, or Spearman's rank correlation."""
    metrics, _ = _library()
    found = {}
    if targets.separator:
        return {"f1_micro": _of_sets(*_sets(targets, outputs, wanted))["f1_micro"]}
    for column, values, own, _ in _columns(targets, outputs, wanted):
        if column.classes:
            found[_name(targets, column, "accuracy")] = float(metrics.accuracy_score(own, values.argmax(1)))
        else:
            found[_name(targets, column, "spearman")] = _spearman(own, values)
    return found


def full(
    targets: Targets, outputs: np.ndarray, wanted: np.ndarray, groups: Sequence[int], seed: int = 0
) -> dict[str, float | list]:
    """All metrics of each column: `name` and, for those of all rows together, `name_interval`, 95 %.

    Args:
        outputs: (rows, targets.outputs) of a head. wanted: (rows, columns). groups: (rows,), the protein of each.

    Of multi-label classification: of all classes together, micro and macro, `exact` of whole sets, and a list of each
    class's own. A metric that is not defined, such as one of a single class, is nan.
    """
    found = {}
    groups = np.asarray(groups)
    if targets.separator:
        return _full_of_sets(targets, outputs, wanted, groups, seed)
    for column, values, own, known in _columns(targets, outputs, wanted):
        score, more = (_of_classes, _more_of_classes) if column.classes else (_of_numbers, _none)
        whole = score(column, own, values)
        intervals = _bootstrap(
            lambda rows, c=column, o=own, v=values, s=score: s(c, o[rows], v[rows]), groups[known], seed
        )
        for name, value in whole.items():
            found[_name(targets, column, name)] = value
            found[_name(targets, column, f"{name}_interval")] = intervals[name]
        found |= {_name(targets, column, name): value for name, value in more(column, own, values).items()}
        found[_name(targets, column, "labels")] = len(own)
    return found


def _sets(targets: Targets, outputs: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, classes) twice: whether the class is there, and its probability."""
    return wanted.astype(bool), targets.probabilities(outputs)[0]


def _of_sets(own: np.ndarray, values: np.ndarray) -> dict[str, float]:
    metrics, _ = _library()
    said = values >= 0.5
    f1 = {kind: float(metrics.f1_score(own, said, average=kind, zero_division=0)) for kind in ("micro", "macro")}
    exact = float((own == said).all(axis=1).mean()) if len(own) else float("nan")
    return {"f1_micro": f1["micro"], "f1_macro": f1["macro"], "exact": exact}


def _full_of_sets(targets: Targets, outputs, wanted, groups: np.ndarray, seed: int) -> dict:
    metrics, _ = _library()
    own, values = _sets(targets, outputs, wanted)
    intervals = _bootstrap(lambda rows: _of_sets(own[rows], values[rows]), groups, seed)
    found = {}
    for name, value in _of_sets(own, values).items():
        found |= {name: value, f"{name}_interval": intervals[name]}
    classes = []
    for column, there, chance in zip(targets.columns, own.T, values.T, strict=True):
        both = 0 < there.sum() < len(there)
        areas = {"auroc": metrics.roc_auc_score, "auprc": metrics.average_precision_score}
        scores = {name: float(score(there, chance)) if both else float("nan") for name, score in areas.items()}
        scores["f1"] = float(metrics.f1_score(there, chance >= 0.5, zero_division=0))
        classes.append({"class": column.name, "labels": int(there.sum())} | scores)
    for name in ("auroc", "auprc"):
        known = [one[name] for one in classes if one[name] == one[name]]
        found[f"{name}_macro"] = float(np.mean(known)) if known else float("nan")
    return found | {"labels": len(own), "classes": classes}


def _name(targets: Targets, column: Target, metric: str) -> str:
    return metric if len(targets.columns) == 1 else f"{column.name}: {metric}"


def _columns(targets: Targets, outputs: np.ndarray, wanted: np.ndarray):
    """Each column with predictions and labels where there are labels, as numbers or probabilities and classes."""
    for number, (column, values) in enumerate(zip(targets.columns, targets.numbers(outputs), strict=True)):
        known = ~np.isnan(wanted[:, number])
        own = wanted[known, number]
        yield column, values[known], own.astype(int) if column.classes else own * column.spread + column.mean, known


def _library():
    try:
        import scipy.stats
        import sklearn.metrics
    except ImportError:
        raise ImportError("metrics need scikit-learn: pip install 'esm_fast[sklearn]'") from None
    return sklearn.metrics, scipy.stats


def _spearman(own: np.ndarray, values: np.ndarray) -> float:
    if len(own) < 2 or not own.std() or not values.std():
        return float("nan")
    return float(_library()[1].spearmanr(own, values).statistic)


def _of_numbers(column: Target, own: np.ndarray, values: np.ndarray) -> dict[str, float]:
    metrics, _ = _library()
    r2 = float(metrics.r2_score(own, values)) if len(own) > 1 and own.std() else float("nan")
    error = float(metrics.mean_absolute_error(own, values)) if len(own) else float("nan")
    return {"r2": r2, "mae": error, "spearman": _spearman(own, values)}


def _of_classes(column: Target, own: np.ndarray, values: np.ndarray) -> dict[str, float]:
    metrics, _ = _library()
    best = values.argmax(1)
    if not len(own):
        return dict.fromkeys(("accuracy", "balanced_accuracy", "f1", "mcc"), float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that a resample lacks
        return {
            "accuracy": float(metrics.accuracy_score(own, best)),
            "balanced_accuracy": float(metrics.balanced_accuracy_score(own, best)),
            "f1": float(metrics.f1_score(own, best, average="macro", zero_division=0)),
            "mcc": float(metrics.matthews_corrcoef(own, best)),
        }


def _more_of_classes(column: Target, own: np.ndarray, values: np.ndarray) -> dict:
    """Areas under curves, one class against the others and their mean, and the confusion counts: [true][predicted]."""
    metrics, _ = _library()
    there = np.unique(own)
    numbers = there if len(column.classes) > 2 else [1]
    areas = {"auroc": float("nan"), "auprc": float("nan")}
    if len(there) > 1:
        pairs = [(own == number, values[:, number]) for number in numbers]
        areas["auroc"] = float(np.mean([metrics.roc_auc_score(*pair) for pair in pairs]))
        areas["auprc"] = float(np.mean([metrics.average_precision_score(*pair) for pair in pairs]))
    labels = list(range(len(column.classes)))
    counts = metrics.confusion_matrix(own, values.argmax(1), labels=labels).tolist() if len(own) else []
    return areas | {"classes": list(column.classes), "confusion": counts}


def _none(column: Target, own: np.ndarray, values: np.ndarray) -> dict:
    return {}


def _bootstrap(score: Callable, groups: np.ndarray, seed: int) -> dict[str, list[float]]:
    """95 % of what resampled proteins give."""
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(groups) else []
    generator, found = np.random.default_rng(seed), []
    alone = all(len(rows) == 1 for rows in members)
    for _ in range(_RESAMPLES if members else 1):
        chosen = generator.integers(0, max(len(members), 1), len(members))
        rows = order[chosen] if alone else np.concatenate([members[number] for number in chosen])
        found.append(score(rows))
    return {
        name: np.nanpercentile(values, _INTERVAL).tolist() if not np.isnan(values).all() else [float("nan")] * 2
        for name in found[0]
        for values in [np.array([scores[name] for scores in found])]
    }
