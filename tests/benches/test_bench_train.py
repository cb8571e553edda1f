"""The benchmark of training, on a toy model: that the peers train the same model on the same tokens."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers")


@pytest.fixture
def bench(monkeypatch):
    import bench_train

    monkeypatch.setattr(bench_train, "in_a_process", bench_train.run)  # quicker; only the memory means nothing then
    return bench_train


def arguments(out, *peers):
    return [
        *("--tiny", "--rounds", "2", "--proteins", "4", "--precision", "float32", "--batch-tokens", "1000"),
        *("--out", str(out), "--peers", *peers),
    ]


def test_a_toy_model(bench, tmp_path):
    pytest.importorskip("accelerate")
    assert bench.main(arguments(tmp_path, "sorted-loop", "hf-trainer")) == 0
    rows = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert [row["peer"] for row in rows] == ["hf-trainer-float32", "sorted-loop-float32", "esm_fast-float32"]
    ours, _ = rows[2]["outcomes"]
    for row in rows:
        outcome, _ = row["outcomes"]
        assert outcome["tokens"] == ours["tokens"] > 500 and outcome["seconds"] > 0
        assert outcome["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    assert "| sorted-loop-float32" in (tmp_path / "train.md").read_text()


def test_a_peer_that_computes_something_else_is_no_peer(bench, tmp_path, monkeypatch):
    def wrong(task):
        outcome = bench.Outcome(loss=3.0, norm=1.0, tokens=10, seconds=1.0, peak=1)
        return replace(outcome, loss=3.01) if task.peer == "sorted-loop" else outcome

    monkeypatch.setattr(bench, "in_a_process", wrong)
    with pytest.raises(AssertionError, match="sorted-loop's loss of the first batch is 3.01 in float32, ours 3.0"):
        bench.main(arguments(tmp_path, "sorted-loop"))


def test_inside_hugging_faces_trainer(tmp_path, monkeypatch):
    """With adapters, accelerated and not; what trains otherwise has no time."""
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    import bench_inside_trainer as bench

    few = ["--tiny", "--steps", "1", "--rounds", "1", "--kinds", "lora", "--out", str(tmp_path)]
    assert bench.main(few) == 0
    ours, theirs = json.loads((tmp_path / "inside_trainer.json").read_text())["rows"][::-1]
    assert (ours["peer"], theirs["peer"], theirs["ratio"]) == ("accelerated", "Hugging Face", 1)
    monkeypatch.setattr(bench, "train", lambda *given, fast: (1, 1, 3.0 + 0.01 * fast))
    with pytest.raises(AssertionError, match="the losses differ"):
        bench.main(few)
