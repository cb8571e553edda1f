"""The default fine-tuning beside scikit-learn on the same features and the same splits, over several seeds.

    python benches/finetune_sets.py tem1 examples/tem1_activity.fasta.gz -o tem1.csv
    python benches/bench_finetune.py tem1.csv --task regression --seeds 5 --also attention lora full

The features are computed once. Each seed draws other splits (a tenth for validation, a tenth for testing). Scikit-learn
gets the training part, and training and validation part together; ours the same two, the validation part to choose the
penalty and then, unless --no-refit, to solve the head again. `--also` trains other heads on the frozen model, or the
model too, each from the same start, on the training part alone. With `--out` scores are kept as they come, and the
same command makes only those that lack.
"""

import argparse
import copy
import json
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import esm_fast
from esm_fast.train.examples import Columns, read_examples
from esm_fast.train.finetune import Settings, finetune
from esm_fast.train.head import solve, solve_again
from esm_fast.train.labelled import features_of, labelled_of
from esm_fast.train.metrics import quick

SHOWN = {"regression": "spearman", "classification": "accuracy"}


def baselines(task: str) -> dict:
    if task == "regression":
        found = {"Ridge()": Ridge(), "RidgeCV(1e-3 ... 1e6)": RidgeCV(np.logspace(-3, 6, 19))}
    else:
        found = {f"LogisticRegression(C={c})": LogisticRegression(C=c, max_iter=1000) for c in (1.0, 0.01)}
    return {name: make_pipeline(StandardScaler(), model) for name, model in found.items()}


def scores(data, features: np.ndarray, task: str) -> dict[str, float]:
    """Of the test part, by what made the predictions."""
    parts = {split: data.part(features, data.of(split)) for split in ("train", "valid", "test")}
    test, found = parts["test"], {}
    solved = solve(data.targets, parts["train"], parts["valid"])
    found["esm-fast finetune --no-refit"] = quick(data.targets, solved(test.rows), test.wanted)[SHOWN[task]]
    solved = solve_again(data.targets, parts["train"] + parts["valid"], solved)
    found["esm-fast finetune"] = quick(data.targets, solved(test.rows), test.wanted)[SHOWN[task]]
    for given in (("train",), ("train", "valid")):
        known = [parts[split].known(0) for split in given]
        rows, wanted = (np.concatenate([getattr(part, what) for part in known]) for what in ("rows", "wanted"))
        for name, model in baselines(task).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.fit(rows, wanted.astype(int) if task == "classification" else wanted)
            outputs = (
                model.predict_log_proba(test.rows) if task == "classification" else model.predict(test.rows)[:, None]
            )
            found[f"{name} on {' + '.join(given)}"] = quick(data.targets, outputs, test.wanted)[SHOWN[task]]
    return found


ALSO = {
    "mlp": {"head": "mlp"},
    "attention": {"head": "attention"},
    "lora": {"trained": "lora"},
    "full": {"trained": "full"},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table")
    add("--task", required=True, choices=tuple(SHOWN))
    add("--level", default="sequence", choices=("sequence", "residue"))
    add("--label-column", default="label")
    add("--model", default="esm1b_t6_demo")
    add("--seeds", type=int, default=5)
    add("--limit", type=int, help="the first of the table's rows")
    add("--also", nargs="*", default=[], choices=tuple(ALSO))
    add("--epochs", type=int, default=10)
    add("--precision", default="bfloat16", help="of what --also trains (default: %(default)s)")
    add("--out", type=Path, metavar="JSON", help="where scores are kept")
    return parser.parse_args()


class Scores(dict):
    """name -> {seed: score}, in a file if there is one."""

    def __init__(self, path: Path | None):
        super().__init__(json.loads(path.read_text()) if path and path.exists() else {})
        self.path = path

    def has(self, name: str, seed: int) -> bool:
        return str(seed) in self.get(name, {})

    def keep(self, name: str, seed: int, score: float) -> None:
        self.setdefault(name, {})[str(seed)] = score
        if self.path:
            self.path.write_text(json.dumps(self, indent=1))


def main() -> None:
    args = parse()
    examples = read_examples(args.table, Columns(label=(args.label_column,)))[: args.limit]
    esm, _ = esm_fast.load(args.model, packed=False, device="cpu", dtype="float32")
    more, kept = {"task": args.task, "level": args.level, "unknown": "x"}, Scores(args.out)
    solved(args, esm, examples, more, kept)
    for name in args.also:
        for seed in range(args.seeds):
            if not kept.has(name, seed):
                start = time.perf_counter()
                precise = {"epochs": args.epochs, "precision": args.precision, "overlength": "truncate"}
                own = Settings(**more, **ALSO[name], **precise, seed=seed)
                report = finetune(copy.deepcopy(esm), examples, own, lambda entry: print(entry, flush=True)).report
                kept.keep(name, seed, report["test"][SHOWN[args.task]])
                kept.keep(f"{name}, best epoch", seed, report["best_epoch"])
                print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{len(examples):,} examples; {SHOWN[args.task]} of the test part: mean, spread, and each seed")
    for name, scores in kept.items():
        values = [scores[str(seed)] for seed in range(args.seeds) if str(seed) in scores]
        print(f"{name:50} {np.mean(values):.4f}  {np.std(values):.4f}  {' '.join(f'{v:.4f}' for v in values)}")


def solved(args, esm, examples, more: dict, kept: Scores) -> None:
    """Our default and scikit-learn's, on features that are computed once."""
    lacking = [seed for seed in range(args.seeds) if not kept.has("esm-fast finetune", seed)]
    if not lacking:
        return
    settings, layer = [Settings(**more, seed=seed, overlength="window") for seed in lacking], esm.config.layers
    features = features_of(esm, labelled_of(esm, examples, settings[0]), [layer], None)[layer]
    for seed, own in zip(lacking, settings, strict=True):
        for name, score in scores(labelled_of(esm, examples, own), features, args.task).items():
            kept.keep(name, seed, score)


if __name__ == "__main__":
    main()
