"""The default fine-tuning beside scikit-learn on the same features and the same splits, over several seeds.

    python benches/bench_finetune.py table.csv --task regression --label-column activity --seeds 5

The features are computed once. Each seed draws other splits (a tenth for validation, a tenth for testing). Scikit-learn
gets the training part, and training and validation part together; ours the same two, the validation part to choose the
penalty and then, unless --no-refit, to solve the head again.
`--trained lora` and `full` train the model too, from the same start, on seed 0 alone.
"""

import argparse
import copy
import time
import warnings

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table")
    parser.add_argument("--task", required=True, choices=tuple(SHOWN))
    parser.add_argument("--level", default="sequence", choices=("sequence", "residue"))
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--model", default="esm1b_t6_demo")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, help="the first of the table's rows")
    parser.add_argument("--trained", nargs="*", default=[], choices=("full", "lora"))
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    examples = read_examples(args.table, Columns(label=(args.label_column,)))[: args.limit]
    esm, _ = esm_fast.load(args.model, packed=False, device="cpu")
    more = dict(level=args.level, unknown="x")
    settings = [Settings(args.task, seed=seed, overlength="window", **more) for seed in range(args.seeds)]
    layer = esm.config.layers
    start = time.perf_counter()
    features = features_of(esm, labelled_of(esm, examples, settings[0]), [layer], None)[layer]
    print(f"{len(examples):,} proteins, features in {time.perf_counter() - start:.0f} s")
    found = [scores(labelled_of(esm, examples, own), features, args.task) for own in settings]
    print(f"{SHOWN[args.task]} of the test part, mean and each of {args.seeds} seeds")
    for name in found[0]:
        values = [one[name] for one in found]
        print(f"{name:45} {np.mean(values):.4f}  {' '.join(f'{value:.4f}' for value in values)}", flush=True)
    for trained in args.trained:
        own = Settings(args.task, trained=trained, epochs=args.epochs, overlength="truncate", **more)
        report = finetune(copy.deepcopy(esm), examples, own, lambda entry: print(entry, flush=True)).report
        print(f"{trained:45} {report['test'][SHOWN[args.task]]:.4f}  (seed 0, epoch {report['best_epoch']})")


if __name__ == "__main__":
    main()
