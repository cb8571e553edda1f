"""Fine-tuning: labels, heads, adapters, early stopping, and the predictor that is saved."""

import contextlib
import copy
import csv
import dataclasses
import gzip
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from predictors import CONFIG, LETTERS, proteins
from torchrun import run_processes

import esm_fast
from esm_fast.cli import main
from esm_fast.inference.embed import embed
from esm_fast.inference.outputs import Batch, Given
from esm_fast.inference.windows import Segment
from esm_fast.models import esm2
from esm_fast.models.esm1 import ESM1
from esm_fast.sequences.fasta import FastaError
from esm_fast.train import adapters, metrics
from esm_fast.train.begun import Begun, BegunError
from esm_fast.train.examples import Columns, Example, ExamplesError, labelled, read_examples
from esm_fast.train.finetune import Settings, finetune
from esm_fast.train.head import solve, solve_again
from esm_fast.train.model import new_model
from esm_fast.train.parts import Part, moments
from esm_fast.train.predictor import Predictor, load_predictor
from esm_fast.train.ridge import Ridge
from esm_fast.train.splits import folds, warnings_of, with_splits
from esm_fast.train.targets import Target, Targets

ROTARY = esm2.Config(2, 32, 64, 2)

pytestmark = pytest.mark.usefixtures("one_thread", "few_resamples")  # models this small are slower on two


def examples(label_of, count=120):
    splits = ["train"] * 8 + ["valid", "test"]
    return [Example(f"p{i}", s, {"label": label_of(s)}, splits[i % 10]) for i, s in enumerate(proteins(count))]


LABELS = {
    ("regression", "sequence"): lambda s: str(10 + 5 * s.count("L") / len(s)),
    ("classification", "sequence"): lambda s: "many" if sum(map(s.count, "LAGVS")) > len(s) / 4 else "few",
    ("regression", "residue"): lambda s: " ".join("nan" if c == "W" else str(LETTERS.index(c) % 3) for c in s),
    ("classification", "residue"): lambda s: "".join("?" if c == "W" else "abc"[LETTERS.index(c) % 3] for c in s),
}


@pytest.mark.parametrize("head", ["solved", "descent"])
@pytest.mark.parametrize("task, level", LABELS)
def test_a_frozen_model_stays_and_its_head_learns(esm, task, level, head, tmp_path):
    before = {name: tensor.clone() for name, tensor in esm.state_dict().items()}
    entries = []
    given = examples(LABELS[task, level], 240 if level == "sequence" else 80)
    rate = 1e-2 if head == "descent" else None
    settings = Settings(task, level, head=head, epochs=20, patience=20, batch_tokens=400, learning_rate=rate)
    predictor, report, held_out = finetune(esm, given, settings, entries.append)
    assert all(torch.equal(before[name], tensor) for name, tensor in esm.state_dict().items())
    score = report["test"]["spearman" if task == "regression" else "balanced_accuracy"]
    assert score > {"regression": 0.3, "classification": 0.6}[task]
    if head == "descent":
        assert entries[-1]["train_loss"] < 0.8 * entries[0]["train_loss"]
        best = min(entries, key=lambda entry: entry["valid_loss"])
        assert report["best_epoch"] == best["epoch"] and report["valid"]["loss"] == pytest.approx(best["valid_loss"])
    assert [one.example.name for one in held_out if one.example.split == "test"] == [
        f"p{i}" for i in range(9, len(given), 10)
    ]

    texts = proteins(7, seed=5)
    predicted = predictor.predict(texts)
    predictor.save(tmp_path / "out", report)
    again = load_predictor(tmp_path / "out")
    if task == "classification":
        assert again.predict(texts) == predicted
        rows = predictor.predict_proba(texts)
        classes = predictor.targets.columns[0].classes
        best = [[classes[k] for k in np.atleast_2d(p).argmax(1)] for p in rows]
        assert best == (predicted if level == "residue" else [[name] for name in predicted])
        assert all(abs(np.atleast_2d(p).sum(1) - 1).max() < 1e-6 for p in rows)
    else:
        for one, other in zip(predicted, again.predict(texts), strict=True):
            assert one == pytest.approx(other, abs=1e-4)
        with pytest.raises(ValueError, match="no probabilities"):
            predictor.predict_proba(texts)
    if level == "residue":
        assert [len(values) for values in predicted] == list(map(len, texts))
    alone = [predictor.predict([text], batch_tokens=1)[0] for text in texts]
    assert alone == predicted


@pytest.mark.parametrize("config", [CONFIG, ROTARY], ids=["learned", "rotary"])
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_the_model_is_trained_too(config, trained, tmp_path):
    esm = new_model(config, seed=0, std=0.05)
    if trained == "lora":
        pytest.importorskip("peft")
    before = {name: tensor.clone() for name, tensor in esm.state_dict().items()}
    entries = []
    settings = Settings("regression", "residue", trained, "descent", epochs=3, learning_rate=3e-3, batch_tokens=200)
    given = examples(LABELS["regression", "residue"], 60)
    predictor, report, _ = finetune(esm, given, settings, entries.append)
    assert entries[-1]["train_loss"] < entries[0]["train_loss"] and report["best_epoch"] > 0
    changed = {name for name, tensor in predictor.esm.state_dict().items() if not torch.equal(before[name], tensor)}
    if trained == "lora":  # the adapters are merged: the same names, and only those matrices are others
        assert changed and all(name.split(".")[-2] in adapters.TARGETS for name in changed)
    else:
        assert "layers.0.fc1.weight" in changed and "embed_tokens.weight" in changed
    predictor.save(tmp_path, report)
    model, _ = esm_fast.load(tmp_path / "model.safetensors")
    (_, arrays), *_ = embed(model, [("x", "MKTAYIAKQR")], layers=(2,))
    batch_of_one = predictor.esm.forward_packed(_pack("MKTAYIAKQR"), layers=(2,)).representations[2]
    np.testing.assert_allclose(arrays[2], batch_of_one[1:-1].mean(0).detach().numpy(), atol=1e-5)


def _pack(text):
    from esm_fast.alphabet import encode_definition
    from esm_fast.sequences.batching import pack

    ids = np.array(encode_definition(text), dtype=np.uint8)
    return pack(ids, np.array([0]), np.array([len(ids)]), np.array([0]))


def test_adapters_compute_what_pefts_own_modules_do():
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = new_model(CONFIG, seed=0, std=0.3)
    adapters.add(model, rank=4)
    layer = model.layers[0]
    before = model.forward_packed(_pack("MKTAYIAK"), layers=(2,)).representations[2]
    for module in (layer.self_attn.q_proj, layer.fc1):
        torch.nn.init.normal_(module.lora_B["default"].weight, std=0.3)
    out = model.forward_packed(_pack("MKTAYIAK"), layers=(2,)).representations[2]
    assert (out - before).abs().max() > 1e-2
    adapters.merge(model)
    assert not any("lora" in name for name, _ in model.named_parameters())
    merged = model.forward_packed(_pack("MKTAYIAK"), layers=(2,)).representations[2]
    torch.testing.assert_close(merged, out, atol=1e-5, rtol=1e-5)


def test_training_begins_with_the_solved_head_and_never_ends_above_it(esm):
    given = examples(LABELS["regression", "residue"], 60)
    solved = finetune(esm, given, Settings("regression", "residue")).report["valid"]["loss"]
    for rate in (1e-4, 10.0):
        settings = Settings("regression", "residue", "full", epochs=2, learning_rate=rate, precision="bfloat16")
        report = finetune(copy.deepcopy(esm), given, settings).report
        assert report["valid"]["loss"] <= solved + 1e-6 and (report["best_epoch"] == 0 or rate < 1)


def test_it_stops_early_and_keeps_the_best(esm):
    noise = np.random.default_rng(0)
    settings = Settings("regression", head="descent", epochs=50, patience=2, learning_rate=1.0, batch_tokens=300)
    _, report, _ = finetune(esm, examples(lambda s: str(noise.normal())), settings)
    assert report["best_epoch"] + 2 == report["epochs"] < 50


def test_the_solved_head_is_scikit_learns(esm):
    """Logistic regression, and the mean of ridge regressions, on standardised features of training and validation part:
    the same numbers."""
    from sklearn import linear_model
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for task, refit in (("regression", True), ("regression", False), ("classification", True)):
        given = examples(LABELS[task, "sequence"], 240)
        predictor, report, _ = finetune(esm, given, Settings(task, refit=refit))
        known = [e for e in given if e.split == "train" or (refit and e.split == "valid")]
        tested = [e.sequence for e in given if e.split == "test"]
        x, z = (
            np.stack([a[2] for _, a in embed(esm, own, layers=(2,))]) for own in ([e.sequence for e in known], tested)
        )
        (penalties,), wanted = report["penalties"], [e.labels["label"] for e in known]
        if task == "regression":
            wanted = np.array(wanted, dtype=float)
            models = [make_pipeline(StandardScaler(), linear_model.Ridge(p * len(x))) for p in penalties]
            expected = np.mean([m.fit(x, wanted).predict(z) for m in models], axis=0)
            found = np.array(predictor.predict(tested))
            scale = (found - wanted.mean()) / (expected - wanted.mean())
            assert 0.01 <= scale.mean() <= 1 + 1e-4
            np.testing.assert_allclose(scale, scale.mean(), rtol=1e-3)
        else:
            (penalty,) = penalties
            logistic = linear_model.LogisticRegression(C=1 / (penalty * len(x)), max_iter=2000, tol=1e-8)
            expected = make_pipeline(StandardScaler(), logistic).fit(x, wanted).predict_proba(z)
            np.testing.assert_allclose(predictor.predict_proba(tested), expected, atol=2e-2)


def test_leave_one_out_is_that_of_as_many_fits():
    from sklearn import linear_model

    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 6)).astype(np.float32) * 3 + 1
    y = (x[:, 0] + generator.normal(size=40)).astype(np.float32)
    mean, spread = moments(x)
    z, penalties = (x - mean) / spread, np.array([1e-3, 0.1, 10])
    for penalty, said in zip(penalties, Ridge(Part(x, y)).left_out(penalties).T, strict=True):
        fits = [linear_model.Ridge(penalty * 40).fit(np.delete(z, i, 0), np.delete(y, i)) for i in range(40)]
        np.testing.assert_allclose(said, [fit.predict(z[i : i + 1])[0] for i, fit in enumerate(fits)], rtol=1e-5)


def test_the_order_of_noisy_labels_is_not_shrunk_away():
    """Few labels of much noise, as of single mutants: the lowest squared error calls for a head so nearly constant that
    its order suffers. The numbers stay right too: their squared error is no higher."""
    from scipy.stats import spearmanr
    from sklearn.linear_model import RidgeCV

    scores, targets = [], Targets("regression", "sequence", (Target("y"),))
    for seed in range(20):
        generator = np.random.default_rng(seed)
        hidden = generator.normal(size=(800, 40)) * np.logspace(0, -1.5, 40)
        x = (hidden @ np.linalg.qr(generator.normal(size=(40, 40)))[0]).astype(np.float32)
        truth = hidden @ (generator.normal(size=40) / np.logspace(0, -1.5, 40)) / 40**0.5
        y = (truth + 3 * generator.normal(size=800)).astype(np.float32)
        train, valid, test = (Part(x[a:b], y[a:b, None]) for a, b in ((0, 240), (240, 300), (300, 800)))
        ours = solve_again(targets, train + valid, solve(targets, train, valid))(test.rows)[:, 0]
        mean, spread = moments(x[:300])
        both, rows = (x[:300] - mean) / spread, (test.rows - mean) / spread
        theirs = RidgeCV(np.logspace(-3, 6, 19)).fit(both, y[:300]).predict(rows)
        for said in (ours, theirs):
            rank = 0.0 if said.std() < 1e-9 else spearmanr(said, truth[300:]).statistic
            scores.append((rank, np.square(said - truth[300:]).mean()))
    ours, theirs = np.mean(scores[::2], axis=0), np.mean(scores[1::2], axis=0)
    assert ours[0] > theirs[0] and ours[1] < 1.1 * theirs[1], (ours, theirs)


def test_each_label_counts_alike_whatever_the_batches(esm):
    """The gradients of an epoch's batches, each divided as the descent divides it, sum to that of all at once."""
    from esm_fast.train.descent import batches

    lengths = np.random.default_rng(0).integers(1, 60, 50)
    order = np.random.default_rng(1).permutation(50)
    cut = list(batches(order, lengths, 100))
    assert sorted(sum(cut, [])) == list(range(50)) and sum(cut, []) == order.tolist()
    assert all(sum(lengths[b] + 2) <= 100 or len(b) == 1 for b in cut)


def test_several_labels_some_missing(esm, tmp_path):
    given = examples(str, 100)
    given = [
        Example(
            e.name,
            e.sequence,
            {"l": "" if i % 3 == 0 else str(e.sequence.count("L")), "g": str(e.sequence.count("G"))},
            e.split,
        )
        for i, e in enumerate(given)
    ]
    predictor, report, _ = finetune(esm, given, Settings("regression", folds=3))
    assert report["valid"]["l: labels"] < report["valid"]["g: labels"] == 10 and report["folds"]["g: labels"] == 100
    predictor.save(tmp_path / "out")
    found = load_predictor(tmp_path / "out").predict(["MKTLLG", "GG"])
    assert set(found) == {"l", "g"} and len(found["l"]) == 2


def test_rare_classes_count_when_weights_are_balanced(esm):
    given = examples(lambda s: "rare" if s.count("W") > 3 else "usual", 300)
    recalls = []
    for weights in ("none", "balanced"):
        _, report, _ = finetune(esm, given, Settings("classification", class_weights=weights))
        recalls.append(report["valid"]["confusion"][0][0] + report["test"]["confusion"][0][0])
    assert recalls[1] > recalls[0]


def test_the_best_layer_is_found_in_half_precision_too(esm):
    given = examples(LABELS["regression", "residue"], 60)
    settings = Settings("regression", "residue", layer="best", precision="bfloat16")
    predictor, report, _ = finetune(esm, given, settings)
    each = [dataclasses.replace(settings, layer=layer) for layer in (0, 1, -1)]
    losses = [finetune(esm, given, own).report["valid"]["loss"] for own in each]
    assert report["layer"] == predictor.layer == np.argmin(losses) and len(set(losses)) == 3
    assert esm.dtype == torch.float32


def test_gradients_do_not_reach_a_frozen_model(esm):
    predictor = Predictor(esm.requires_grad_(False), Targets("regression", "sequence"))
    batch = _pack("MKT")
    predictor.head(
        predictor.features(batch, esm.forward_packed(batch, layers=(2,)).representations[2])
    ).sum().backward()
    assert predictor.head.weight.grad is not None and all(p.grad is None for p in esm.parameters())


def test_metrics_of_one_label_are_undefined():
    targets = Targets("regression", "sequence")
    found = metrics.full(targets, np.ones((1, 1), np.float32), np.full((1, 1), 2.0), [0])
    assert np.isnan(found["r2"]) and np.isnan(found["spearman"]) and found["mae"] == 1


def test_intervals_hold_the_metric_and_resample_proteins():
    generator = np.random.default_rng(0)
    targets = Targets("classification", "residue", (Target("label", ("a", "b", "c")),))
    wanted = generator.integers(0, 3, (600, 1)).astype(float)
    outputs = np.eye(3)[wanted[:, 0].astype(int)] + generator.normal(size=(600, 3))
    wide = metrics.full(targets, outputs, wanted, np.repeat(np.arange(6), 100))
    narrow = metrics.full(targets, outputs, wanted, np.arange(600))
    for found in (wide, narrow):
        for name in ("accuracy", "balanced_accuracy", "f1", "mcc"):
            low, high = found[f"{name}_interval"]
            assert low < found[name] < high
    assert 0.5 < wide["auroc"] < 1 and 0.34 < wide["auprc"] < 1 and sum(map(sum, wide["confusion"])) == 600


# ---- tables


def table(folder, text):
    (folder / "t.csv").write_text(text)
    return folder / "t.csv"


def test_a_table_is_read(tmp_path):
    found = read_examples(table(tmp_path, "id,sequence,label,split\na,mkt,1.5,train\nb,MKV,2,valid\n"))
    assert [(e.name, e.sequence, e.labels, e.split, e.line) for e in found] == [
        ("a", "MKT", {"label": "1.5"}, "train", 2),
        ("b", "MKV", {"label": "2"}, "valid", 3),
    ]
    tabs = read_examples(table(tmp_path, "sequence\tlabel\nMKT\tx y\n"))
    assert tabs[0].labels == {"label": "x y"} and tabs[0].name == "line 2" and tabs[0].split == ""


def test_splits_that_are_drawn(tmp_path):
    many = [Example(f"{s}{k}", s, {"label": str(len(s) % 2)}) for s in proteins(300) for k in (1, 2)]
    drawn = with_splits(many, stratify=True)
    splits = {e.sequence: e.split for e in drawn}
    assert all(e.split == splits[e.sequence] for e in drawn)  # equal sequences are never divided
    counts = [sum(e.split == split and e.labels["label"] == "1" for e in drawn) for split in ("train", "valid", "test")]
    ones = sum(e.labels["label"] == "1" for e in many)
    assert abs(counts[1] - ones / 10) <= 4 and abs(counts[2] - ones / 10) <= 4
    assert {e.name: e.split for e in with_splits(many[::-1], stratify=True)} == {e.name: e.split for e in drawn}
    assert with_splits(many, seed=1, stratify=True) != drawn
    clusters = {e.name: e.sequence[:1] for e in many}
    numbers = folds(many, 5, seed=0, stratify=False, clusters=clusters)
    of = {}
    assert all(of.setdefault(e.sequence[:1], n) == n for e, n in zip(many, numbers, strict=True))
    two = [dataclasses.replace(e, split="test" if i < 100 else "train") for i, e in enumerate(many)]
    with_valid = with_splits(two, stratify=True)
    assert [e.split == "test" for e in with_valid] == [i < 100 for i in range(600)]
    assert 40 <= sum(e.split == "valid" for e in with_valid) <= 60


def test_leaks_and_contradictions_are_counted():
    rows = [
        ("MK", "1", "train"),
        ("MK", "1", "test"),
        ("MKT", "1", "train"),
        ("MKT", "2", "train"),
        ("MV", "1", "valid"),
    ]
    found = warnings_of(
        [Example(f"p{i}", s, {"label": x}, split, f"t.csv: line {i}") for i, (s, x, split) in enumerate(rows)]
    )
    assert found == [
        "proteins of test that are in train too: 1, such as t.csv: line 0",
        "sequences with labels that contradict each other: 1, such as t.csv: line 2 and t.csv: line 3",
    ]


def test_rows_of_every_source_are_the_same(tmp_path):
    pandas, parquet = pytest.importorskip("pandas"), pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [dict(id=f"p{i}", sequence=s, label=i % 7 + 0.5, split="train") for i, s in enumerate(proteins(9))]
    rows[3]["label"] = float("nan")
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "t.csv")
    parquet.write_table(pyarrow.Table.from_pandas(frame), tmp_path / "t.parquet")
    fasta = "".join(f">{r['id']} label={r['label']} SPLIT=train\n{r['sequence']}\n" for r in rows)
    (tmp_path / "t.fasta").write_text(fasta)
    (tmp_path / "s.fasta.gz").write_bytes(
        gzip.compress("".join(f">{r['id']} x\n{r['sequence']}\n" for r in rows).encode())
    )
    frame.drop(columns="sequence").to_csv(tmp_path / "l.tsv", sep="\t", index=False)
    letters = "".join(f">{r['id']}\n{'H' * len(r['sequence'])}\n" for r in rows)
    (tmp_path / "l.fasta").write_text(letters)
    sources = [tmp_path / "t.csv", tmp_path / "t.parquet", tmp_path / "t.fasta", frame, rows]
    read = [read_examples(source) for source in sources]
    read.append(read_examples(tmp_path / "s.fasta.gz", labels=tmp_path / "l.tsv"))
    plain = [[(e.name, e.sequence, e.labels, e.split) for e in found] for found in read]
    assert all(found == plain[0] for found in plain) and plain[0][3][2] == {"label": ""}
    residues = read_examples(tmp_path / "s.fasta.gz", labels=tmp_path / "l.fasta")
    assert residues[0].labels == {"label": "H" * len(rows[0]["sequence"])}
    with pytest.raises(ExamplesError, match=r"line 5: label is missing .* 1 rows in all; use --missing skip"):
        labelled(read[0], "error")
    assert len(labelled(read[0], "skip")) == 8
    (tmp_path / "x.csv").write_text("Seq;Tm;set\nMKT;1,5;Validation\n")
    found = read_examples(tmp_path / "x.csv", Columns(label=("Tm",)))
    assert (found[0].labels, found[0].split) == ({"Tm": "1,5"}, "valid")
    (tmp_path / "few.csv").write_text("id,label\np0,1\n")
    with pytest.raises(ExamplesError, match=r"few.csv has no labels for 8 proteins of .*s.fasta.gz, such as p1"):
        read_examples(tmp_path / "s.fasta.gz", labels=tmp_path / "few.csv")
    (tmp_path / "twice.fasta").write_text(f"{letters}>p0\n{'C' * len(rows[0]['sequence'])}\n")
    with pytest.raises(ExamplesError, match=r"twice.fasta: line 19: the id 'p0' was there before"):
        read_examples(tmp_path / "s.fasta.gz", labels=tmp_path / "twice.fasta")


@pytest.mark.parametrize(
    "text, problem",
    [
        ("id,label\na,1\n", "line 1: there is no column 'sequence'"),
        ("sequence,label\nMKT,1,2\n", "line 2: it has not as many columns"),
        ("sequence,label\nMKT\n", "line 2: it has not as many columns"),
        ("sequence,label\n,1\n", "line 2: sequence is empty"),
        ("sequence,label,split\nMKT,1,eval\n", "line 2: split is 'eval'"),
    ],
)
def test_a_bad_table_is_refused_by_line(tmp_path, text, problem):
    with pytest.raises(ExamplesError, match=problem):
        read_examples(table(tmp_path, text))


@pytest.mark.parametrize(
    "task, level, label, problem",
    [
        ("regression", "sequence", "x", "bad: label: could not convert"),
        ("regression", "sequence", "nan", "bad: label: nan is no number"),
        ("classification", "sequence", "other", "bad: no training example has the class 'other'"),
        ("classification", "residue", "ab", "bad: 3 residues and 2 labels in label"),
        ("regression", "residue", "1 2 3 4", "bad: 3 residues and 4 labels in label"),
    ],
)
def test_a_bad_label_is_refused_by_name(esm, task, level, label, problem):
    given = examples(LABELS[task, level]) + [Example("bad", "MKT", {"label": label}, "valid")]
    with pytest.raises(ExamplesError, match=problem):
        finetune(esm, given, Settings(task, level))


ROWS = [(s, str(i % 7)) for i, s in enumerate(proteins(40))]
PLAIN = "sequence,label\n" + "".join(f"{s},{label}\n" for s, label in ROWS)


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        gzip.compress(PLAIN.encode()),
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace(",", ";").encode(),
        PLAIN.replace(",", "*,").replace("sequence*", "sequence").encode(),
        PLAIN.replace("\n", "\n\n").encode(),
        ("," + PLAIN.replace("\n", "\n0,").removesuffix("0,")).encode(),
        "".join(f'"{c.replace(",", chr(34) + "," + chr(34))}"\n' for c in PLAIN.splitlines()).encode(),
    ],
    ids=["byte-order mark", "UTF-16", "gz", "CRLF", "semicolons", "stops", "empty lines", "pandas' index", "quotes"],
)
def test_tables_as_programs_write_them(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    assert [(e.sequence, e.labels["label"]) for e in read_examples(tmp_path / "t.csv")] == ROWS


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"sequence,label\nMKT,\xe9\n", "t.csv: line 2 is not UTF-8"),
        (b'sequence,label\nMKT,1\n"5-NT,2\nMKV,3\n', "t.csv: line 3: a quote that opens there is never closed"),
        (b"sequence,label\nMKT,1\0\n", "t.csv: line 2 holds a NUL"),
        (b"sequence,sequence,label\nM,M,1\n", "t.csv: line 1 names the column 'sequence' twice"),
        (b"", "t.csv: line 1 names 0 columns"),
        (b"sequence,label\n", "t.csv has no rows"),
        (gzip.compress(PLAIN.encode())[:-20], "t.csv: "),
    ],
)
def test_damaged_tables_are_refused_by_file_and_line(tmp_path, content, problem):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ExamplesError, match=problem):
        read_examples(tmp_path / "t.csv")


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=300) | st.text(alphabet='sequencelab,\t;"\n\r x\0é', max_size=120).map(str.encode))
def test_any_bytes_as_a_table_are_read_or_refused_by_name(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with contextlib.suppress(ExamplesError):
        read_examples(tmp_path / "t.csv")


def test_a_class_is_never_missing(esm):
    for missing in ("nan", "NaN", "NA", "None"):
        given = examples(LABELS["classification", "sequence"]) + [Example("bad", "MKT", {"label": missing}, "train")]
        with pytest.raises(ExamplesError, match=f"bad: label is '{missing}', which is no class"):
            finetune(esm, given, Settings("classification"))


def test_an_output_is_looked_at_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    """A file, a folder that holds another predictor or model, no parent: refused at once, and kept."""
    monkeypatch.setattr("esm_fast.train.finetune.finetune", lambda *_, **__: pytest.fail("it was trained"))
    path = table(tmp_path, PLAIN)
    (tmp_path / "file").write_text("keep")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("precious")
    for output, problem in (("file", "is a file"), ("mine", "--force"), ("no/where", "does not exist")):
        assert main(["finetune", str(path), "-o", str(tmp_path / output), "--task", "regression"]) == 1
        assert problem in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "keep" and (
        tmp_path / "mine" / "model.safetensors"
    ).read_text() == "precious"
    with pytest.raises(ValueError, match="learning_rate is 0.0; give a number above 0"):
        Settings("regression", learning_rate=0.0)


def test_sequences_go_by_the_policies_of_embed(esm):
    for sequence, problem in (
        ("MK1T", r"t.csv: line 9, column 3: .*--unknown x|t.csv: line 9"),
        ("M" * 63, "t.csv: line 9"),
    ):
        bad = Example("bad", sequence, {"label": "1"}, "train", "t.csv: line 9")
        given = examples(lambda s: str(len(s) % 2)) + [bad]
        with pytest.raises(ExamplesError, match=problem):
            finetune(esm, given, Settings("classification"))
        counted = {"MK1T": ("skip", "error"), "M" * 63: ("error", "window")}[sequence]
        _, report, _ = finetune(esm, given, Settings("classification", unknown=counted[0], overlength=counted[1]))
        assert report["counts"]["left out for an unknown residue"] == (sequence == "MK1T")
        assert report["counts"]["windowed"] == (sequence != "MK1T")
    predictor, *_ = finetune(esm, examples(LABELS["regression", "sequence"]), Settings("regression"))
    with pytest.raises(FastaError, match="not a residue"):
        predictor.predict(["MK1T"])
    assert len(predictor.predict(["MK1T", "M" * 63], unknown="x", overlength="window")) == 2


def test_the_command(tmp_path, capsys):
    rows = [f"{e.sequence},{e.labels['label']},{e.split}" for e in examples(LABELS["classification", "sequence"], 40)]
    path = table(tmp_path, "\n".join(["sequence,label,split", *rows]))
    arguments = ["finetune", str(path), "-o", str(tmp_path / "out"), "--task", "classification", "--epochs", "2"]
    model = tmp_path / "model.safetensors"
    esm_fast.weights.save(ESM1(CONFIG), model)
    assert main([*arguments, "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "valid     loss" in out and "test      loss" in out and "solved on layer 2" in out
    about = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert about["targets"]["columns"][0]["classes"] == ["few", "many"] and about["base"] == str(model)
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["split"] for row in written] == ["valid"] * 4 + ["test"] * 4
    assert main([*arguments[:1], str(tmp_path / "none.csv"), *arguments[2:]]) == 1
    assert "none.csv: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("task, level", LABELS)
def test_the_command_predict(esm, task, level, tmp_path, capsys):
    """The table holds what the predictor says, in the FASTA's order, and probabilities, of long proteins too."""
    pyarrow = pytest.importorskip("pyarrow.parquet")
    finetune(esm, examples(LABELS[task, level], 60), Settings(task, level)).predictor.save(tmp_path / "p")
    texts = proteins(20, seed=9) + ["MKT" * 50]
    fasta = "".join(f">q{i} x\n{text}\n" for i, text in enumerate(texts))
    (tmp_path / "in.fasta.gz").write_bytes(gzip.compress(fasta.encode()))
    run = ["predict", str(tmp_path / "p"), str(tmp_path / "in.fasta.gz"), "--overlength", "window", "-o"]
    assert main([*run, str(tmp_path / "o.csv")]) == 0 == main([*run, str(tmp_path / "o.parquet")])
    assert main([*run, str(tmp_path / "o.csv")]) == 1 and "--force" in capsys.readouterr().err
    with open(tmp_path / "o.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    table = pyarrow.read_table(tmp_path / "o.parquet").to_pylist()
    assert [row["id"] for row in rows] == [row["id"] for row in table]
    predictor = load_predictor(tmp_path / "p")
    expected = predictor.predict(texts, overlength="window")
    flat = [value for values in expected for value in values] if level == "residue" else expected
    if task == "classification":
        assert [row["label"] for row in rows] == flat == [row["label"] for row in table]
        (column,) = predictor.targets.columns
        assert all(abs(sum(float(row[f"p_{name}"]) for name in column.classes) - 1) < 1e-6 for row in rows)
    else:
        np.testing.assert_allclose([float(row["label"]) for row in rows], flat, atol=1e-4)
        np.testing.assert_allclose([row["label"] for row in table], flat, atol=1e-4)
    if level == "residue":
        assert "".join(row["residue"] for row in rows) == "".join(texts)
        assert [int(row["position"]) for row in rows] == [n for text in texts for n in range(1, len(text) + 1)]
    assert main(["predict", str(tmp_path), str(tmp_path / "in.fasta.gz"), "-o", str(tmp_path / "no.csv")]) == 1
    assert "holds no predictor" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["o.csv", "o.tsv"])
def test_residues_are_written_as_csv_has_them(name, tmp_path):
    """All lines of a protein at once: names and classes with a delimiter, a quote, a percent sign; missing numbers."""
    from esm_fast.cli.predictions import table

    classes = (",", '"', "%", "\t")
    columns = (Target("x", classes), Target("y"))
    for targets in (Targets("classification", "residue", columns[:1]), Targets("regression", "residue", columns[1:])):
        outputs = np.random.default_rng(0).normal(size=(40, targets.outputs)).astype(np.float32)
        for missing in (False, True):
            outputs[3] = np.nan if missing else outputs[3]
            with table(tmp_path / name, name, targets) as add:
                add(['p,"1"\t%s'], np.arange(40) % 20 + 4, outputs, iter(()))
            with open(tmp_path / name, newline="") as file:
                header, *rows = csv.reader(file, delimiter="," if name == "o.csv" else "\t", strict=True)
            assert all(row[:2] == ['p,"1"\t%s', str(n)] for n, row in enumerate(rows, 1)) and len(rows) == 40
            values = np.array([[float(cell or "nan") for cell in row[3:][-targets.outputs :]] for row in rows])
            expected = targets.numbers(outputs)[0].reshape(40, -1)
            np.testing.assert_allclose(values, expected, rtol=1e-8)
            if targets.task == "classification":
                assert [row[3] for row in rows] == [classes[k] for k in expected.argmax(1)]


def test_a_predictor_of_before_is_read(esm, tmp_path):
    """One column of labels, its targets written flat, without a layer."""
    finetune(esm, examples(LABELS["regression", "sequence"], 60), Settings("regression")).predictor.save(tmp_path)
    about = json.loads((tmp_path / "finetune.json").read_text())
    (column,) = about["targets"].pop("columns")
    del about["layer"], about["targets"]["separator"], about["targets"]["name"], column["name"]
    (tmp_path / "finetune.json").write_text(json.dumps({"targets": about["targets"] | column}))
    assert len(load_predictor(tmp_path).predict(["MKT"])) == 1


def test_json_lines_are_a_table(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"sequence": "MKT", "label": 1.5, "split": "train"}\n\n{"seq": "", "sequence": "GG", "label": null}\n'
    )
    first, second = read_examples(path)
    assert (first.sequence, first.labels, first.split) == ("MKT", {"label": "1.5"}, "train")
    assert second.labels == {"label": ""} and "line 3" in second.place
    for bad in ('{"sequence": "MKT"', "[1]", "{" * 5000):
        path.write_text('{"sequence": "MKT", "label": 1}\n' + bad)
        with pytest.raises(ExamplesError, match="a.jsonl: line 2 is n"):
            read_examples(path)


# ---- what takes long is resumed, divided, and kept apart


class Killed(Exception):
    pass


def killed_again_and_again(esm, given, settings, path, every):
    """The training, cut off after each `every` batches and begun again until it ends: (what came, how often)."""
    for times in range(100):
        done = iter(range(10**6))

        def on_batch(residues, done=done):
            if next(done) == every:
                raise Killed

        begun = Begun(path, {"of": "this"}, seconds=-1)
        with contextlib.suppress(Killed):
            torch.manual_seed(0)
            return finetune(copy.deepcopy(esm), given, settings, on_batch=on_batch, begun=begun), times
    raise AssertionError("it never ended")


@pytest.mark.parametrize("trained, head", [("full", "solved"), ("lora", "descent"), ("frozen", "mlp")])
def test_a_training_that_was_killed_is_the_uninterrupted_one(esm, trained, head, tmp_path):
    if trained == "lora":
        pytest.importorskip("peft")
    settings = Settings("regression", trained=trained, head=head, epochs=3, batch_tokens=500, recompute=True)
    given = examples(LABELS["regression", "sequence"], 80)
    torch.manual_seed(0)
    whole = finetune(copy.deepcopy(esm), given, settings)
    passes = len(given) // 8  # of the frozen model, before the first update
    pieces, times = killed_again_and_again(esm, given, settings, tmp_path / "t.safetensors", passes + 2)
    assert times >= 1 and pieces.report["curve"] == whole.report["curve"] and len(whole.report["curve"]) == 3
    a, b = whole.predictor.state_dict(), pieces.predictor.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)

    with pytest.raises(BegunError, match="of another training: of differ"):
        Begun(tmp_path / "t.safetensors", {"of": "that"}).load()
    content = bytearray((tmp_path / "t.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(BegunError, match="damaged"):
        Begun(tmp_path / "t.safetensors", {"of": "this"}).load()


@pytest.mark.parametrize("head", ["mlp", "attention"])
def test_other_heads_begin_as_the_solved_one_and_are_kept(esm, head, tmp_path):
    """Whether there is a W: of the mean of random features a linear head sees little."""
    given = examples(lambda s: "yes" if "W" in s else "no", 160)
    solved = finetune(esm, given, Settings("classification", refit=False)).report["valid"]["loss"]
    still = Settings("classification", head=head, epochs=1, learning_rate=1e-30, refit=False)
    assert finetune(esm, given, still).report["curve"][0]["valid_loss"] == pytest.approx(solved, rel=1e-4)
    settings = Settings("classification", head=head, epochs=30, patience=30, learning_rate=1e-2, batch_tokens=500)
    predictor, report, _ = finetune(esm, given, settings)
    assert report["valid"]["loss"] < solved - 0.02 and report["best_epoch"] > 0
    texts = proteins(6, seed=5) + ["MKTAYW" * 20]
    predictor.save(tmp_path / "p", report)
    again, options = load_predictor(tmp_path / "p"), dict(overlength="window")
    for one, other in zip(*(p.predict_proba(texts, **options) for p in (predictor, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    if head == "attention":  # of windows: the softmax over all residues
        output, rows = predictor.output(), torch.randn(90, 32)
        cut = [Segment("x", np.zeros(0), 0, 60, np.array([0, 30]), 0, 90)]
        cut.append(cut[0]._replace(start=30, number=1))
        assert output.finish(joined_parts(output, rows, cut)).shape == (2,)
        twice = torch.cat([rows[:60], rows[30:]])
        share = torch.cat([torch.ones(30), torch.full((60,), 0.5), torch.ones(30)])[:, None]
        score = twice @ output.head.query.T
        weight = share * (score - score.amax(0)).exp()
        expected = (weight * (twice @ output.head.weight.T)).sum(0) / weight.sum(0) + output.head.bias
        np.testing.assert_allclose(output.finish(joined_parts(output, rows, cut)), expected, rtol=1e-5)


def joined_parts(output, rows, segments):
    whole = None
    for segment in segments:
        tokens = rows[segment.start : segment.start + 60]
        framed = torch.cat([torch.zeros(1, 32), tokens, torch.zeros(1, 32)])
        given = Given(None, {output.layer: framed}, [], None, None)
        (part,) = output.reduce(given, Batch(None, [segment], [(0, 62)], torch.float32))
        whole = output.join(whole, part, segment)
    return whole


def test_multi_label(esm, tmp_path, capsys):
    def label(sequence):
        there = [name for name, letter in {"a": "L", "b": "W", "c": "K"}.items() if sequence.count(letter) > 1]
        return ";".join(there) or ";"

    given = examples(label, 200)
    given[0] = dataclasses.replace(given[0], labels={"label": "a; rare"}, split="test")
    predictor, report, held_out = finetune(esm, given, Settings("classification", multi_label=";"))
    assert report["test"]["f1_micro"] > 0.6 and [one["class"] for one in report["test"]["classes"]] == ["a", "b", "c"]
    assert any("left out: 1, such as rare" in text for text in report["warnings"])
    predictor.save(tmp_path / "p", report)
    again, texts = load_predictor(tmp_path / "p"), [one.example.sequence for one in held_out]
    said, chances = again.predict(texts), again.predict_proba(texts)
    assert all(isinstance(one, tuple) and set(one) <= set("abc") for one in said) and len(set(said)) > 2
    assert all(p.shape == (3,) and ["abc"[k] for k in np.flatnonzero(p >= 0.5)] == list(one)
               for p, one in zip(chances, said, strict=True))  # fmt: skip
    (tmp_path / "in.fasta").write_text("".join(f">q{i}\n{text}\n" for i, text in enumerate(texts)))
    assert main(["predict", str(tmp_path / "p"), str(tmp_path / "in.fasta"), "-o", str(tmp_path / "o.csv")]) == 0
    with open(tmp_path / "o.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "label", "p_a", "p_b", "p_c"]
    assert [row["label"] for row in rows] == [";".join(one) or ";" for one in said]
    all_learned = finetune(esm, given[1:], Settings("classification", multi_label=";")).report["warnings"]
    assert not any("left out" in text for text in all_learned)
    plain = finetune(esm, given[1:], Settings("classification")).report["warnings"]
    assert any("--multi-label" in text for text in plain)


@pytest.mark.parametrize("trained", ["frozen", "lora"])
def test_head_and_adapters_alone(esm, trained, tmp_path, capsys):
    if trained == "lora":
        pytest.importorskip("peft")
    rows = [f"{e.sequence},{e.labels['label']},{e.split}" for e in examples(LABELS["regression", "sequence"], 60)]
    path, base = table(tmp_path, "\n".join(["sequence,label,split", *rows])), tmp_path / "base.safetensors"
    esm_fast.weights.save(esm, base)
    arguments = ["finetune", str(path), "--task", "regression", "--trained", trained, "--model", str(base)]
    arguments += ["--epochs", "2", "--learning-rate", "3e-2", "--head", "descent"]
    for name, more in {"whole": [], "alone": ["--alone"]}.items():
        assert main([*arguments, "-o", str(tmp_path / name), *more]) == 0
    there = {file.name for file in (tmp_path / "alone").iterdir()}
    assert "model.safetensors" not in there and "curves.png" in there and "training.safetensors" not in there
    texts, folder = proteins(5, seed=3), tmp_path / "alone"
    whole, alone = (load_predictor(tmp_path / name) for name in ("whole", "alone"))
    assert alone.predict(texts) == whole.predict(texts)
    alone.save(tmp_path / "merged")
    assert load_predictor(tmp_path / "merged").predict(texts) == whole.predict(texts)

    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    base.rename(moved)
    esm_fast.weights.save(new_model(CONFIG, seed=1, std=0.05), other)
    (tmp_path / "in.fasta").write_text(">a\nMKTAYW\n")
    for model, code, said in ((None, 1, "base.safetensors"), (other, 1, "another model"), (moved, 0, "")):
        more = ["--base", str(model)] if model else []
        out = ["-o", str(tmp_path / f"{code}.csv")]
        assert main(["predict", str(folder), str(tmp_path / "in.fasta"), *out, *more]) == code
        assert said in capsys.readouterr().err
    assert main([*arguments, "-o", str(tmp_path / "no"), "--alone", "--trained", "full"]) == 1


def test_processes_divide_a_training(esm, tmp_path):
    """The losses of one process, to within the order of sums; predictions of all held-out proteins, once."""
    rows = [f"{e.sequence},{e.labels['label']},{e.split}" for e in examples(LABELS["regression", "sequence"], 60)]
    path, base = table(tmp_path, "\n".join(["sequence,label,split", *rows])), tmp_path / "base.safetensors"
    esm_fast.weights.save(esm, base)
    arguments = ["finetune", str(path), "--task", "regression", "--trained", "full", "--model", str(base)]
    arguments += ["--epochs", "3", "--learning-rate", "1e-3", "--batch-tokens", "100", "--threads", "1"]
    assert main([*arguments, "-o", str(tmp_path / "one")]) == 0
    run_processes(2, "-m", "esm_fast.cli", *arguments, "-o", tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "finetune.json").read_text()) for name in ("one", "two"))
    for a, b in zip(one["curve"], two["curve"], strict=True):
        np.testing.assert_allclose([a["train_loss"], a["valid_loss"]], [b["train_loss"], b["valid_loss"]], rtol=1e-3)
    assert two["test"]["labels"] == one["test"]["labels"] == 6
