"""Fine-tuning and predicting on pairs of proteins."""

import contextlib
import copy
import csv
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from predictors import proteins
from torchrun import run_processes

import esm_fast
from esm_fast.cli import main
from esm_fast.inference.embed import embed
from esm_fast.train import splits
from esm_fast.train.begun import Begun
from esm_fast.train.examples import Columns, Example, ExamplesError, read_examples
from esm_fast.train.finetune import Settings, finetune
from esm_fast.train.predictor import load_predictor

pytestmark = pytest.mark.usefixtures("one_thread", "few_resamples")


def pairs_of(label_of, count=160, different=60, split=True):
    """Random pairs of few proteins, so that each is in several."""
    generator, known = np.random.default_rng(1), proteins(different)
    parts = ["train"] * 8 + ["valid", "test"]
    made = []
    for i in range(count):
        a, b = (known[n] for n in generator.integers(0, different, 2))
        own = {"label": label_of(a, b)}
        made.append(Example(f"a{i}", a, own, parts[i % 10] if split else "", f"row {i}", i, b, f"b{i}"))
    return made


def more_of_l(a, b):
    return "yes" if a.count("L") / len(a) > b.count("L") / len(b) else "no"


def similar(a, b):
    return str(abs(a.count("L") / len(a) - b.count("L") / len(b)))


def of_both(kind, u, v):
    """By numpy, as the docs say it."""
    both = [np.abs(u - v), u * v]
    return np.concatenate([u, v, *both] if kind == "ordered" else [u + v, *both], axis=1)


@pytest.mark.parametrize("kind", ["ordered", "symmetric"])
def test_the_solved_head_is_scikit_learns_on_both_proteins(esm, kind, tmp_path):
    from sklearn import linear_model
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    label = more_of_l if kind == "ordered" else (lambda a, b: "near" if float(similar(a, b)) < 0.03 else "far")
    given = pairs_of(label)
    predictor, report, held_out = finetune(esm, given, Settings("classification", pairs=kind))
    known = [e for e in given if e.split != "test"]
    tested = [e.proteins for e in given if e.split == "test"]
    mean = {s: a[2] for s in proteins(60) for _, a in embed(esm, [s], layers=(2,))}
    x, z = (of_both(kind, *(np.stack([mean[pair[side]] for pair in own]) for side in (0, 1)))
            for own in ([e.proteins for e in known], tested))  # fmt: skip
    ((penalty,),) = report["penalties"]
    logistic = linear_model.LogisticRegression(C=1 / (penalty * len(x)), max_iter=2000, tol=1e-8)
    wanted = [e.labels["label"] for e in known]
    expected = make_pipeline(StandardScaler(), logistic).fit(x, wanted).predict_proba(z)
    found = predictor.predict_proba(tested)
    np.testing.assert_allclose(found, expected, atol=2e-2)
    of_test = [one for one in held_out if one.example.split == "test"]
    assert [one.example.proteins for one in of_test] == tested
    again = [predictor.targets.probabilities(one.outputs)[0][0] for one in of_test]
    np.testing.assert_allclose(again, found, atol=1e-5)

    predictor.save(tmp_path / "p", report)
    loaded = load_predictor(tmp_path / "p")
    swapped = loaded.predict_proba([pair[::-1] for pair in tested], batch_tokens=50)
    one_by_one = [loaded.predict_proba([pair])[0] for pair in tested]
    assert np.array_equal(one_by_one, found)  # neighbours change no bit
    assert np.array_equal(swapped, found) == (kind == "symmetric")
    assert loaded.predict(iter(tested[:2])) == predictor.predict(tested[:2])
    with pytest.raises(TypeError, match="two strings"):
        loaded.predict(["MKT"])
    assert len(loaded.predict([("MK1T", "MKT"), ("MKT", "MKT")], unknown="x")) == 2


@pytest.mark.parametrize("trained, head", [("full", "solved"), ("lora", "mlp")])
def test_the_model_is_trained_with_both_and_resumes(esm, trained, head, tmp_path):
    """The gradient of a batch is that of a plain loop over its pairs; killed, the training is the uninterrupted one."""
    if trained == "lora":
        pytest.importorskip("peft")
    given = pairs_of(similar, 60)
    settings = Settings("regression", trained=trained, head=head, epochs=2, batch_tokens=300, pairs="symmetric")
    torch.manual_seed(0)
    whole = finetune(copy.deepcopy(esm), given, settings)
    done = iter(range(10**6))

    def on_batch(residues):
        if next(done) == 12:
            raise InterruptedError

    for _ in range(2):
        begun = Begun(tmp_path / "t.safetensors", {"of": "this"}, seconds=-1)
        with contextlib.suppress(InterruptedError):
            torch.manual_seed(0)
            pieces = finetune(copy.deepcopy(esm), given, settings, on_batch=on_batch, begun=begun)
    assert pieces.report["curve"] == whole.report["curve"] and len(whole.report["curve"]) == 2
    a, b = whole.predictor.state_dict(), pieces.predictor.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_gradients_are_those_of_a_plain_loop(esm):
    from esm_fast.train.descent import Descent
    from esm_fast.train.labelled import labelled_of
    from esm_fast.train.predictor import Predictor

    given = pairs_of(similar, 40)
    settings = Settings("regression", trained="full", epochs=1, batch_tokens=10**6, pairs="ordered", weight_decay=0.0)
    data = labelled_of(esm, given, settings)
    assert len(data.tokens) == len({s for e in given for s in e.proteins}) < 80
    predictor = Predictor(esm, data.targets, 2, pairs="ordered")
    predictor.set_head(np.random.default_rng(0).normal(size=(1, 128)).astype(np.float32), np.ones(1, np.float32))
    features = np.random.default_rng(0).normal(size=(40, 128)).astype(np.float32)
    descent = Descent(predictor, data, features, settings)
    chosen = data.of("train")[::-1]
    outputs = descent.head(*descent._features(chosen))
    data.targets.loss(outputs, torch.from_numpy(data.wanted_of(chosen)))[0].backward()
    ours = {name: p.grad.clone() for name, p in esm.named_parameters() if p.grad is not None}
    esm.zero_grad()
    total = 0.0
    for number in chosen:
        u, v = (_mean(esm, sequence) for sequence in given[number].proteins)
        x = torch.cat([u, v, (u - v).abs(), u * v])
        total = (
            total + (predictor.head.weight @ x + predictor.head.bias - float(data.wanted[number][0, 0])).square().sum()
        )
    total.backward()
    theirs = {name: p.grad for name, p in esm.named_parameters() if p.grad is not None}
    most = max(float(grad.abs().max()) for grad in theirs.values())
    assert most > 1e-3
    for name, grad in theirs.items():
        torch.testing.assert_close(ours.get(name, torch.zeros_like(grad)), grad, rtol=1e-3, atol=1e-5 * most)


def _mean(esm, text):
    from esm_fast.alphabet import encode_definition
    from esm_fast.sequences.batching import pack

    ids = np.array(encode_definition(text), dtype=np.uint8)
    batch = pack(ids, np.array([0]), np.array([len(ids)]), np.array([0]))
    return esm.forward_packed(batch, layers=(2,)).representations[2][1:-1].mean(0)


EDGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=30, max_size=120)


@hypothesis_settings(max_examples=60, deadline=None)
@given(EDGES, st.booleans(), st.booleans())
def test_no_held_out_pair_is_known_by_both_its_proteins(edges, hub, clustered):
    """Each pair of test has a protein (or its cluster has) that train and valid have not; each of valid one that train
    has not; each fold likewise, and nothing is tested twice."""
    edges = [(0, b) for _, b in edges] if hub else edges
    given = [Example(f"p{a}", "M" * (a + 1), {"label": "1"}, "", "", i, "M" * (b + 1), f"p{b}")
             for i, (a, b) in enumerate(edges)]  # fmt: skip
    clusters = {f"p{n}": f"c{n // 2}" for n in range(31)} if clustered else None

    def of(example):
        return {clusters[name] for name in example.names} if clustered else set(example.proteins)

    def has_its_own(held, known):
        there = set().union(*map(of, known)) if known else set()
        return all(of(example) - there for example in held)

    try:
        drawn = splits.with_splits(given, seed=3, stratify=False, clusters=clusters)
        parts = {split: [e for e in drawn if e.split == split] for split in ("train", "valid", "test")}
        assert parts["test"] and has_its_own(parts["test"], parts["train"] + parts["valid"])
        assert parts["valid"] and has_its_own(parts["valid"], parts["train"])
        assert max(len(parts["test"]), len(parts["valid"])) <= -(-len(given) // 10)
        tested = []
        for train, valid, test in splits.turns(given, 3, seed=3, stratify=False, clusters=clusters):
            train, valid, own = ([given[n] for n in part] for part in (train, valid, test))
            assert has_its_own(own, train + valid) and has_its_own(valid, train)
            tested += test
        assert len(set(tested)) == len(tested)
    except ExamplesError as error:
        assert re.search("divided by protein|has no example", str(error))


def test_mutants_are_divided_though_all_have_their_wild_type():
    wild = "M" * 50
    given = [Example(f"m{i}", wild[:i] + "A" + wild[i + 1 :], {"label": "1"}, "", "", i, wild, "wt") for i in range(50)]
    drawn = [e.split for e in splits.with_splits(given, stratify=False)]
    assert [drawn.count(split) for split in ("train", "valid", "test")] == [40, 5, 5]
    assert sum(len(test) for _, _, test in splits.turns(given, 5, seed=0, stratify=False, clusters=None)) == 50


def test_leaks_between_pairs_are_counted():
    rows = [
        ("MA", "MC", "train", "1"),
        ("MD", "ME", "train", "1"),
        ("MC", "MA", "test", "2"),
        ("MA", "MD", "test", "1"),
        ("MA", "MF", "test", "1"),
        ("MF", "MG", "valid", "1"),
    ]
    given = [
        Example(f"p{i}", a, {"label": x}, split, f"t.csv: line {i}", i, b, "")
        for i, (a, b, split, x) in enumerate(rows)
    ]
    expected = [
        "pairs of test that are in train too: 1 of 3, such as t.csv: line 2",
        "pairs of test whose proteins are both in train, in other pairs: 1 of 3, such as t.csv: line 3",
        "pairs of test with one protein that is in train: 1 of 3, such as t.csv: line 4",
    ]
    assert splits.warnings_of(given, kind="ordered") == expected
    differing = "pairs with labels that contradict each other: 1, such as t.csv: line 0 and t.csv: line 2"
    assert splits.warnings_of(given, kind="symmetric") == [*expected, differing]


def test_pairs_are_read_from_a_table_or_by_the_ids_of_a_fasta(tmp_path):
    (tmp_path / "t.csv").write_text("ID1,Seq1,id2,seq2,label,split\na,mkt,b,MKV,1,train\nb,MKV,a,MKT*,2,valid\n")
    (tmp_path / "p.fasta").write_text(">a x\nMKT\n>b\nMKV\n")
    (tmp_path / "l.tsv").write_text("bait\tprey\tlabel\tsplit\na\tb\t1\ttrain\nb\ta\t2\tvalid\n")
    one = read_examples(tmp_path / "t.csv", pairs=True)
    two = read_examples(tmp_path / "p.fasta", Columns(id=("bait", "prey")), labels=tmp_path / "l.tsv", pairs=True)
    for found in (one, two):
        plain = [(e.names, e.proteins, e.labels, e.split) for e in found]
        assert plain == [(("a", "b"), ("MKT", "MKV"), {"label": "1"}, "train"),
                         (("b", "a"), ("MKV", "MKT"), {"label": "2"}, "valid")]  # fmt: skip
    assert "l.tsv: line 3" in two[1].place
    no_ids = read_examples([{"sequence_a": "MK", "sequence_b": "MT", "label": 1}], pairs=True)
    assert no_ids[0].names == ("line 1 a", "line 1 b")

    def refused(text, **how):
        (tmp_path / "l.tsv").write_text(text)
        source = how.pop("source", tmp_path / "l.tsv")
        with pytest.raises(ExamplesError) as error:
            read_examples(source, how.pop("columns", Columns()), **how)
        return str(error.value)

    fasta = {"source": tmp_path / "p.fasta", "labels": tmp_path / "l.tsv", "pairs": True}
    assert "l.tsv: line 2: id_b is 'x', and" in refused("id_a,id_b,label\na,x,1\n", **fasta)
    assert "no two columns such as id_a and id_b" in refused("a,b,label\na,b,1\n", **fasta)
    assert "sequence_b is empty" in refused("sequence_a,sequence_b,label\nMK,,1\n", pairs=True)
    assert "such as sequence_a and sequence_b" in refused("sequence,label\nMK,1\n", pairs=True)
    assert "as seq1 and seq2, give --pairs" in refused("seq1,seq2,label\nMK,MK,1\n")
    assert "name both" in refused("a,b,label\nMK,MK,1\n", pairs=True, columns=Columns(sequence="a"))
    assert "are for pairs" in refused("a,b,label\nMK,MK,1\n", columns=Columns(sequence=("a", "b")))
    (tmp_path / "p.fasta").write_text(">a\nMKT\n>a\nMKV\n")
    assert "'a' was there before, with another sequence" in refused("id_a,id_b,label\na,a,1\n", **fasta)


def test_what_does_not_go_with_pairs_is_refused(esm):
    for more in ({"level": "residue"}, {"head": "attention"}):
        with pytest.raises(ValueError, match="pairs have one label each"):
            Settings("classification", pairs="ordered", **more)
    given = pairs_of(similar, 40)
    alone = [dataclasses.replace(e, partner="") for e in given]
    for own, kind in ((given, ""), (alone, "ordered")):
        with pytest.raises(ExamplesError, match="a row has . proteins"):
            finetune(esm, own, Settings("regression", pairs=kind))
    bad = dataclasses.replace(given[3], partner="MK1T")
    with pytest.raises(ExamplesError, match="row 3: the second protein"):
        finetune(esm, [*given[:3], bad, *given[4:]], Settings("regression", pairs="ordered"))
    report = finetune(
        esm, [*given[:3], bad, *given[4:]], Settings("regression", pairs="ordered", unknown="skip")
    ).report
    assert report["counts"]["left out for an unknown residue"] == 1 and report["counts"]["train"] == 31


def test_the_commands(esm, tmp_path, capsys):
    """A table, and a FASTA file with a table of ids; one process and two; both predict as Python does."""
    given, base = pairs_of(more_of_l, 60, different=20), tmp_path / "base.safetensors"
    ids = {s: f"q{i}" for i, s in enumerate(proteins(20))}
    esm_fast.weights.save(esm, base)
    with open(tmp_path / "t.csv", "w", newline="") as file:
        rows = [[*e.proteins, e.labels["label"], e.split] for e in given]
        csv.writer(file).writerows([["sequence_a", "sequence_b", "label", "split"], *rows])
    with open(tmp_path / "ids.csv", "w", newline="") as file:
        rows = [[*(ids[s] for s in e.proteins), e.labels["label"], e.split] for e in given]
        csv.writer(file).writerows([["bait", "prey", "label", "split"], *rows])
    (tmp_path / "p.fasta").write_text("".join(f">{name} x\n{s}\n" for s, name in ids.items()))
    run = ["--task", "classification", "--pairs", "ordered", "--model", str(base), "--threads", "1"]
    assert main(["finetune", str(tmp_path / "t.csv"), "-o", str(tmp_path / "frozen"), *run]) == 0
    assert "whose proteins are both in train" in capsys.readouterr().out
    more = ["--labels", str(tmp_path / "ids.csv"), "--id-column", "bait", "prey", "--trained", "full", "--epochs", "2"]
    more += ["--learning-rate", "1e-3", "--batch-tokens", "100"]
    full = ["finetune", str(tmp_path / "p.fasta"), *run, *more, "-o"]
    assert main([*full, str(tmp_path / "one")]) == 0
    run_processes(2, "-m", "esm_fast.cli", *full, tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "finetune.json").read_text()) for name in ("one", "two"))
    for a, b in zip(one["curve"], two["curve"], strict=True):
        np.testing.assert_allclose([a["train_loss"], a["valid_loss"]], [b["train_loss"], b["valid_loss"]], rtol=1e-3)
    with open(tmp_path / "one" / "predictions.csv", newline="") as file:
        written = list(csv.DictReader(file))
    tested = [e for split in ("valid", "test") for e in given if e.split == split]
    assert [(row["id_a"], row["id_b"]) for row in written] == [tuple(ids[s] for s in e.proteins) for e in tested]

    folder = str(tmp_path / "one")
    predictor = load_predictor(folder)
    expected = np.array(predictor.predict_proba([e.proteins for e in given]))
    inputs = [[str(tmp_path / "t.csv")], [str(tmp_path / "p.fasta"), "--pairs", str(tmp_path / "ids.csv")]]
    inputs[1] += ["--id-column", "bait", "prey"]
    for number, own in enumerate(inputs):
        out = tmp_path / f"{number}.csv"
        assert main(["predict", folder, *own, "-o", str(out)]) == 0
        with open(out, newline="") as file:
            rows = list(csv.DictReader(file))
        said = [[float(row[f"p_{name}"]) for name in predictor.targets.columns[0].classes] for row in rows]
        np.testing.assert_allclose(said, expected, rtol=1e-6)
    assert rows[0]["id_a"] == ids[given[0].sequence] and "60 of 60" in capsys.readouterr().out
    for own, problem in (
        ([str(tmp_path / "p.fasta")], "no two columns such as sequence_a"),
        ([str(tmp_path / "t.csv"), "--empty", "skip"], "--empty is not for pairs"),
        ([str(tmp_path / "t.csv"), str(tmp_path / "t.csv")], "takes one table"),
    ):
        assert main(["predict", folder, *own, "-o", str(tmp_path / "no.csv")]) == 1
        assert problem in capsys.readouterr().err
