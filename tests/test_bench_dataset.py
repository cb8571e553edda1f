"""The benchmark of data sets, on a toy model: that it makes one, and times the model on the same batches."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benches"))
    import bench_dataset

    return bench_dataset


def arguments(out):
    return ["--tiny", "--rounds", "2", "--proteins", "6", "--unit-residues", "900", "--out", str(out)]


def test_a_toy_model(bench, tmp_path):
    assert bench.main(arguments(tmp_path)) == 0
    rows = {row["run"]: row for row in json.loads((tmp_path / "dataset.json").read_text())["rows"]}
    assert all(len(row["seconds"]) == 2 and row["min s"] > 0 for row in rows.values())
    parts = sum(np.array(rows[part]["seconds"]) for part in bench.PARTS)
    np.testing.assert_allclose(rows["data set"]["seconds"], parts)
    assert (np.array(rows[bench.INSIDE]["seconds"])[:, 0] < np.array(rows["units"]["seconds"])[:, 0]).all()
    assert "| data set" in (tmp_path / "dataset.md").read_text()


def test_a_model_that_computes_something_else_is_not_timed(bench, tmp_path, monkeypatch):
    from esm_fast import engine

    def forward(*given, real=engine._forward):
        calls.append(1)
        return [[row + len(calls) for row in rows] for rows in real(*given)]

    calls = []
    monkeypatch.setattr(engine, "_forward", forward)
    with pytest.raises(AssertionError, match="not equal"):
        bench.main(arguments(tmp_path))
