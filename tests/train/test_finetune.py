"""Fine-tuning: labels, heads, adapters, early stopping, and the predictor that is saved."""

import contextlib
import gzip
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import esm_fast
from esm_fast.cli import main
from esm_fast.inference.embed import embed
from esm_fast.models import esm2
from esm_fast.models.esm1 import ESM1, Config
from esm_fast.train import adapters
from esm_fast.train.examples import Example, ExamplesError, Targets, read_examples
from esm_fast.train.finetune import Predictor, Settings, finetune, load_predictor
from esm_fast.train.model import new_model

CONFIG = Config(2, 32, 64, 2, max_positions=64)
ROTARY = esm2.Config(2, 32, 64, 2)
LETTERS = "LAGVSERTIDPKQNFYMHWC"


@pytest.fixture
def esm():
    """Small weights: the last layer still shows which residue stands where."""
    return new_model(CONFIG, seed=0, std=0.05)


def proteins(count, seed=0):
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list(LETTERS), generator.integers(4, 40))) for _ in range(count)]


def examples(label_of, count=120):
    splits = ["train"] * 8 + ["valid", "test"]
    return [Example(f"p{i}", s, label_of(s), splits[i % 10]) for i, s in enumerate(proteins(count))]


LABELS = {
    ("regression", "sequence"): lambda s: str(10 + 5 * s.count("L") / len(s)),
    ("classification", "sequence"): lambda s: "many" if sum(map(s.count, "LAGVS")) > len(s) / 4 else "few",
    ("regression", "residue"): lambda s: " ".join("nan" if c == "W" else str(LETTERS.index(c) % 3) for c in s),
    ("classification", "residue"): lambda s: "".join("?" if c == "W" else "abc"[LETTERS.index(c) % 3] for c in s),
}


@pytest.mark.parametrize("task, level", LABELS)
def test_a_frozen_model_stays_and_its_head_learns(esm, task, level, tmp_path):
    before = {name: tensor.clone() for name, tensor in esm.state_dict().items()}
    entries = []
    epochs, count = (20, 240) if level == "sequence" else (12, 80)
    settings = Settings(task, level, epochs=epochs, patience=epochs, batch_tokens=400)
    predictor, report = finetune(esm, examples(LABELS[task, level], count), settings, entries.append)
    assert all(torch.equal(before[name], tensor) for name, tensor in esm.state_dict().items())
    score = report["test"]["spearman" if task == "regression" else "accuracy"]
    chance = {"regression": 0.3, "classification": 0.6}[task]
    assert score > chance and entries[-1]["train_loss"] < 0.8 * entries[0]["train_loss"]
    best = min(entries, key=lambda entry: entry["valid_loss"])
    assert report["best_epoch"] == best["epoch"] and report["valid"]["loss"] == pytest.approx(best["valid_loss"])

    texts = proteins(7, seed=5)
    predicted = predictor.predict(texts)
    predictor.save(tmp_path / "out", report)
    again = load_predictor(tmp_path / "out").predict(texts)
    if task == "classification":
        assert again == predicted
        assert {name for names in predicted for name in ([names] if level == "sequence" else names)} <= {
            *predictor.targets.classes
        }
    else:
        for one, other in zip(predicted, again, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
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
    settings = Settings("regression", "residue", trained, epochs=2, learning_rate=3e-3, rank=2, batch_tokens=500)
    # What the neighbour is, which no linear head can see.
    neighbour = examples(lambda s: " ".join(str(LETTERS.index(c) % 3) for c in s[1:] + s[:1]), 60)
    predictor, report = finetune(esm, neighbour, settings, entries.append)
    assert entries[-1]["train_loss"] < entries[0]["train_loss"]
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


def test_it_stops_early_and_keeps_the_best(esm):
    noise = np.random.default_rng(0)
    settings = Settings("regression", epochs=50, patience=2, learning_rate=1.0, batch_tokens=300)
    _, report = finetune(esm, examples(lambda s: str(noise.normal())), settings)
    assert report["best_epoch"] + 2 == report["epochs"] < 50


def test_gradients_do_not_reach_a_frozen_model(esm):
    predictor = Predictor(esm.requires_grad_(False), Targets("regression", "sequence"))
    predictor.head(predictor.features(_pack("MKT"))).sum().backward()
    assert predictor.head.weight.grad is not None and all(p.grad is None for p in esm.parameters())


def test_metrics_of_one_label_are_undefined():
    found = Targets("regression", "sequence").metrics(torch.tensor([[1.0]]), torch.tensor([2.0]))
    assert np.isnan(found["r2"]) and np.isnan(found["spearman"])


# ---- tables


def table(folder, text):
    (folder / "t.csv").write_text(text)
    return folder / "t.csv"


def test_a_table_is_read(tmp_path):
    found = read_examples(table(tmp_path, "id,sequence,label,split\na,mkt,1.5,train\nb,MKV,2,valid\n"))
    assert found == [Example("a", "MKT", "1.5", "train"), Example("b", "MKV", "2", "valid")]
    tabs = read_examples(table(tmp_path, "sequence\tlabel\nMKT\tx y\n"))
    assert tabs[0].label == "x y" and tabs[0].name == "line 2"
    many = "sequence,label\n" + "".join(f"{s},1\n{s},2\n" for s in proteins(300))
    splits = {e.sequence: e.split for e in read_examples(table(tmp_path, many))}
    held_out = sum(split == "valid" for split in splits.values())
    assert 10 < held_out < 60
    assert all(e.split == splits[e.sequence] for e in read_examples(table(tmp_path, many)))


@pytest.mark.parametrize(
    "text, problem",
    [
        ("id,label\na,1\n", "line 1: there is no column 'sequence'"),
        ("sequence,label\nMKT,1,2\n", "line 2: it has not as many columns"),
        ("sequence,label\nMKT\n", "line 2: it has not as many columns"),
        ("sequence,label\nMKT,\n", "line 2: label is empty"),
        ("sequence,label,split\nMKT,1,dev\n", "line 2: split is 'dev'"),
    ],
)
def test_a_bad_table_is_refused_by_line(tmp_path, text, problem):
    with pytest.raises(ExamplesError, match=problem):
        read_examples(table(tmp_path, text))


@pytest.mark.parametrize(
    "task, level, label, problem",
    [
        ("regression", "sequence", "x", "bad: label: could not convert"),
        ("regression", "sequence", "nan", "bad: label nan is no number"),
        ("classification", "sequence", "other", "bad: no training example has the class 'other'"),
        ("classification", "residue", "ab", "bad has 3 residues and 2 labels"),
        ("regression", "residue", "1 2 3 4", "bad has 3 residues and 4 labels"),
    ],
)
def test_a_bad_label_is_refused_by_name(esm, task, level, label, problem):
    given = examples(LABELS[task, level]) + [Example("bad", "MKT", label, "valid")]
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
    assert [(e.sequence, e.label) for e in read_examples(tmp_path / "t.csv")] == ROWS


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
        given = examples(LABELS["classification", "sequence"]) + [Example("bad", "MKT", missing, "train")]
        with pytest.raises(ExamplesError, match=f"bad: label is '{missing}', which is no class"):
            finetune(esm, given, Settings("classification"))


def test_an_output_is_looked_at_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    """A file, a folder that holds another predictor or model, no parent: refused at once, and kept."""
    monkeypatch.setattr("esm_fast.train.finetune.finetune", lambda *_: pytest.fail("it was trained"))
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
    assert main(["finetune", str(path), "-o", str(tmp_path / "o"), "--task", "regression", "--learning-rate", "0"]) == 1
    assert "learning_rate is 0.0; give a number above 0" in capsys.readouterr().err


def test_bad_sequences_are_refused_by_name(esm):
    for sequence, problem in (("MK1T", "bad: column 3: '1' is not a residue"), ("M" * 63, "bad has 63 residues")):
        with pytest.raises(ExamplesError, match=problem):
            finetune(esm, examples(str) + [Example("bad", sequence, "1", "train")], Settings("classification"))


def test_the_command(tmp_path, capsys):
    rows = [f"{e.sequence},{e.label},{e.split}" for e in examples(LABELS["classification", "sequence"], 40)]
    path = table(tmp_path, "\n".join(["sequence,label,split", *rows]))
    arguments = ["finetune", str(path), "-o", str(tmp_path / "out"), "--task", "classification", "--epochs", "2"]
    model = tmp_path / "model.safetensors"
    esm_fast.weights.save(ESM1(CONFIG), model)
    assert main([*arguments, "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "epoch 1  train_loss" in out and "valid     loss" in out and "test      loss" in out
    about = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert about["targets"]["classes"] == ["few", "many"] and about["base"] == str(model)
    assert main([*arguments[:1], str(tmp_path / "none.csv"), *arguments[2:]]) == 1
    assert "none.csv: No such file" in capsys.readouterr().err
