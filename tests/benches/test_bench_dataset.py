"""The benchmark of data sets, on a toy model: that it makes one, and times the model on the same batches."""

import json

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")


@pytest.fixture
def bench():
    import bench_dataset

    return bench_dataset


def arguments(out):
    return ["--tiny", "--rounds", "2", "--proteins", "6", "--unit-residues", "900", "--out", str(out)]


def test_a_toy_model(bench, tmp_path):
    assert bench.main(arguments(tmp_path)) == 0
    rows = {row["run"]: row for row in json.loads((tmp_path / "dataset.json").read_text())["rows"]}
    assert list(rows) == [bench.ALONE, *bench.PARTS, bench.TOTAL]
    assert all(len(rows[name]["rounds"]) == 2 and rows[name]["min s"] > 0 for name in (bench.ALONE, *bench.PARTS))
    for key in ("median s", "min CPU s"):
        assert rows[bench.TOTAL][key] == pytest.approx(sum(rows[part][key] for part in bench.PARTS))
    assert "| data set" in (tmp_path / "dataset.md").read_text()


def test_a_model_that_computes_something_else_is_not_timed(bench, tmp_path, monkeypatch):
    from esm_fast.inference import stream

    def forward(*given, real=stream._forward):
        calls.append(1)
        return [[row + len(calls) for row in rows] for rows in real(*given)]

    calls = []
    monkeypatch.setattr(stream, "_forward", forward)
    with pytest.raises(AssertionError, match="not equal"):
        bench.main(arguments(tmp_path))
