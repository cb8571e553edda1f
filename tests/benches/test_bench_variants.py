"""The benchmark of variant effects, on a toy model: the peers score the same, and one that does not is told."""

import json

import pytest

pytest.importorskip("esm.model.esm1", reason="needs fair-esm")
pytest.importorskip("transformers")


@pytest.fixture
def bench():
    import bench_variants

    return bench_variants


def test_a_masked_scan_of_a_toy_model(bench, tmp_path):
    arguments = ["--tiny", "--positions", "4", "--loop-positions", "2", "--rounds", "1", "--out", str(tmp_path)]
    assert bench.main(arguments) == 0
    rows = {row["peer"]: row for row in json.loads((tmp_path / "masked.json").read_text())["rows"]}
    assert rows["esm_fast-fp32"]["error"] < 1e-5 < rows["esm_fast-bf16"]["error"]
    for name, row in rows.items():
        assert row["positions"] == (2 if name.startswith("fair-esm") else 4)
        assert row["whole scan, estimated s"] == pytest.approx(row["median s"] / row["positions"] * 286)


def test_a_peer_that_computes_something_else_is_no_peer(bench, tmp_path, monkeypatch):
    import variant_peers

    monkeypatch.setattr(variant_peers, "MASK", 5)  # what Hugging Face's copies have where the mask should be
    with pytest.raises(AssertionError, match="hf-bf16's scores have error"):
        bench.main(["--tiny", "--positions", "2", "--peers", "hf-bf16", "--rounds", "1", "--out", str(tmp_path)])


def test_wt_beside_embeddings(bench, tmp_path):
    assert bench.main(["--tiny", "--wt", "2", "--rounds", "1", "--out", str(tmp_path)]) == 0
    embeddings, wt = json.loads((tmp_path / "wt.json").read_text())["rows"]
    assert wt["of the embeddings' rate"] == pytest.approx(embeddings["median s"] / wt["median s"])
