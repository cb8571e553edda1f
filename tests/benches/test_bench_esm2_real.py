"""The bench of ESM-2's real weights, on a random model in their place: which differences it takes for fp32's."""

import pytest

transformers = pytest.importorskip("transformers")


@pytest.fixture
def bench():
    import bench_esm2_real

    return bench_esm2_real


@pytest.fixture
def folder(tmp_path):
    from esm_fast import Alphabet

    config = transformers.EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=256, position_embedding_type="rotary", token_dropout=True, emb_layer_norm_before=False,
        layer_norm_eps=1e-5, max_position_embeddings=1026,
    )  # fmt: skip
    transformers.EsmForMaskedLM(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(Alphabet().all_toks))
    return tmp_path


def test_a_model_is_exact_and_one_that_is_off_is_not(bench, folder, monkeypatch):
    proteins = [("a", "MKTAYIAKQR"), ("b", "GSHMLEDPV" * 4)]
    errors = bench.against_transformers(folder, proteins)
    assert bench.exact(errors) and errors["ours, fp64"] > 0
    monkeypatch.setattr(bench, "TRUTH", "bfloat16")
    assert not bench.exact(bench.against_transformers(folder, proteins))


@pytest.mark.parametrize(
    "ours, theirs, right", [(9e-6, 1e-7, True), (1.9e-5, 1e-5, True), (2.1e-5, 1e-5, False), (1.1e-5, 1e-6, False)]
)
def test_contacts_are_judged_by_their_distance_from_fp64(bench, ours, theirs, right):
    errors = {"embeddings": 0.0, "contacts": ours + theirs, "ours, fp64": ours, "theirs, fp64": theirs}
    assert bench.exact(errors) == right
