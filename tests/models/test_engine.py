"""esm_fast.embed: input order, streaming, every pool and policy, windows; packed, padded and alone agree."""

import gc
import gzip
import itertools
import random
import tracemalloc

import numpy as np
import pytest
import torch
from fakes import trained_like

import esm_fast
from esm_fast.models.esm1 import Config
from esm_fast.sequences.fasta import FastaError
from esm_fast.sequences.tokenize import Report

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture(scope="module")
def model():
    return trained_like(esm_fast.ProteinBertModel(Config(2, 16, 32, 2)), 0)


@pytest.fixture(scope="module")
def short_model():
    """Takes 20 residues at most, so that windows are cheap to test."""
    return trained_like(esm_fast.ProteinBertModel(Config(2, 16, 32, 2, max_positions=22)), 0)


def proteins(count, seed=0, longest=90):
    rng = random.Random(seed)
    return [(f"p{i}", "".join(rng.choices(RESIDUES, k=rng.randint(1, longest)))) for i in range(count)]


def reference(model, sequence, layer, pool):
    """One protein alone through the padded API."""
    _, _, tokens = model.alphabet.get_batch_converter()([("x", sequence)])
    with torch.no_grad():
        x = model(tokens, repr_layers=[layer])["representations"][layer][0].numpy()
    inner = x[1:-1]
    return {"mean": inner.mean(0), "cls": x[0], "max": inner.max(0), "std": inner.std(0), "per_residue": inner}[pool]


@pytest.mark.parametrize("pool", ["mean", "cls", "max", "std", "per_residue"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 500, None])
def test_embeddings_are_the_models_in_input_order(model, pool, batch_tokens):
    data = proteins(23)
    got = list(esm_fast.embed(model, data, layers=(0, 1, -1), pool=pool, batch_tokens=batch_tokens))
    assert [label for label, _ in got] == [label for label, _ in data]
    for (_, sequence), (_, arrays) in zip(data, got, strict=True):
        assert set(arrays) == {0, 1, 2} and arrays[-1] is arrays[2]
        for layer in (0, 1, 2):
            assert arrays[layer].dtype == np.float32
            np.testing.assert_allclose(arrays[layer], reference(model, sequence, layer, pool), rtol=0, atol=2e-5)


def test_order_and_neighbours_do_not_matter(model):
    data = proteins(40)
    together = dict(esm_fast.embed(model, data, batch_tokens=300))
    shuffled = random.Random(1).sample(data, len(data))
    for label, arrays in esm_fast.embed(model, shuffled, batch_tokens=131):
        np.testing.assert_allclose(arrays[-1], together[label][-1], rtol=0, atol=1e-5)


def test_a_second_run_is_bit_equal(model):
    data = proteins(20)
    runs = [[a[-1] for _, a in esm_fast.embed(model, data, batch_tokens=256)] for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_strings_paths_and_open_files(model, tmp_path):
    data = proteins(9)
    fasta = "".join(f">{label} some protein\n{sequence}\n" for label, sequence in data).encode()
    path = tmp_path / "x.anything"
    path.write_bytes(gzip.compress(fasta))
    wanted = [a[-1] for _, a in esm_fast.embed(model, data)]
    for source in (path, str(path), path.open("rb"), [s for _, s in data], (s for s in data)):
        got = list(esm_fast.embed(model, source))
        assert all(np.array_equal(a, b[-1]) for a, (_, b) in zip(wanted, got, strict=True))
    assert [label for label, _ in esm_fast.embed(model, path)][0] == "p0 some protein"


def test_it_streams(model):
    """The first results come while there is still input, and memory does not grow with it."""
    endless = (("p", "ACDEFGHIKL") for _ in itertools.count())
    results = esm_fast.embed(model, endless, batch_tokens=64)
    list(itertools.islice(results, 200))
    tracemalloc.start()
    list(itertools.islice(results, 200))
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    list(itertools.islice(results, 1500))
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 100_000


def test_grad_mode_is_the_callers_between_results(model):
    for _ in esm_fast.embed(model, proteins(3), batch_tokens=1):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# --- long proteins ----------------------------------------------------------------------------------------------------


def window_reference(model, sequence, longest):
    """Per residue, the plain average over windows every half window and one flush with the end."""
    starts = [*range(0, len(sequence) - longest, longest // 2), len(sequence) - longest]
    total, count = np.zeros((len(sequence), model.config.embed_dim)), np.zeros((len(sequence), 1))
    for at in starts:
        total[at : at + longest] += reference(model, sequence[at : at + longest], 2, "per_residue")
        count[at : at + longest] += 1
    return total / count


@pytest.mark.parametrize("length", [20, 21, 30, 31, 40, 97])
@pytest.mark.parametrize("batch_tokens", [22, 1000])
def test_windows_are_averaged_per_residue(short_model, length, batch_tokens):
    data = [("before", "ACD"), ("long", proteins(1, seed=length, longest=1)[0][1] * length), ("after", "WYV")]
    data[1] = ("long", "".join(random.Random(length).choices(RESIDUES, k=length)))
    ask = dict(overlength="window", batch_tokens=batch_tokens)
    per_residue = dict(esm_fast.embed(short_model, data, pool="per_residue", **ask))
    means = dict(esm_fast.embed(short_model, data, **ask))
    assert list(means) == ["before", "long", "after"]
    wanted = window_reference(short_model, data[1][1], 20)
    np.testing.assert_allclose(per_residue["long"][-1], wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(means["long"][-1], wanted.mean(0), rtol=0, atol=2e-5)
    assert dict(esm_fast.embed(short_model, data, pool="cls", **ask))["long"][-1].shape == (16,)


def test_too_long_is_an_error_by_default_and_truncation_is_fair_esms(short_model):
    data = [("ok", "ACD"), ("long", "A" * 25)]
    with pytest.raises(FastaError, match="record 2.*'long'.*25 residues.*20"):
        list(esm_fast.embed(short_model, data))
    report = Report()
    got = dict(esm_fast.embed(short_model, data, overlength="truncate", pool="per_residue", report=report))
    assert got["long"][-1].shape == (20, 16) and report.truncated == 1
    np.testing.assert_allclose(got["long"][-1], reference(short_model, "A" * 20, 2, "per_residue"), rtol=0, atol=2e-5)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sequence, message", [("ACJ", "column 3.*'J'"), ("AC1D", "column 3.*'1'"), ("", "no residues")]
)
def test_bad_records_are_named(model, sequence, message):
    with pytest.raises(FastaError, match=f"record 2.*{message}"):
        list(esm_fast.embed(model, [("good", "ACD"), ("bad", sequence)]))


def test_policies_count_what_they_do(model):
    data = [("a", "ACJJ"), ("b", ""), ("c", "ACD*"), ("d", "acd")]
    report = Report()
    got = dict(esm_fast.embed(model, data, unknown="x", empty="skip", report=report))
    assert list(got) == ["a", "c", "d"]
    assert (report.records, report.unknown, report.empty, report.stops_stripped) == (4, 2, 1, 1)
    np.testing.assert_array_equal(got["c"][-1], got["d"][-1])
    np.testing.assert_allclose(got["a"][-1], reference(model, "ACXX", 2, "mean"), rtol=0, atol=2e-5)
    report = Report()
    assert [label for label, _ in esm_fast.embed(model, data[:1] + data[2:], unknown="skip", report=report)] == [
        "c",
        "d",
    ]
    assert report.skipped_unknown == 1


def test_mask_tokens_are_honoured(model):
    ((_, got),) = esm_fast.embed(model, ["AC<mask>D"])
    np.testing.assert_allclose(got[-1], reference(model, "AC<mask>D", 2, "mean"), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layers=(3,)), "layer 3 does not exist: the model has 0"),
        (dict(layers=(-4,)), "layer -4 does not exist"),
        (dict(layers=()), "layers is empty"),
        (dict(pool="median"), "pool is 'median'"),
        (dict(pool="contacts"), "pool is 'contacts'"),
        (dict(batch_tokens=0), "batch_tokens is 0"),
        (dict(unknown="drop"), "unknown"),
        (dict(overlength="cut"), "overlength"),
        (dict(empty="x"), "empty"),
    ],
)
def test_wrong_arguments_are_refused_at_once(model, options, message):
    with pytest.raises(ValueError, match=message):
        esm_fast.embed(model, ["ACD"], **options)


def test_a_sequence_in_place_of_a_path_is_explained(model):
    with pytest.raises(FileNotFoundError, match=r"give a list: \[sequence\]"):
        list(esm_fast.embed(model, "ACDEFG"))


def test_half_weights_give_float32_embeddings(model):
    import copy

    half = copy.deepcopy(model).bfloat16()
    exact, got = (next(iter(esm_fast.embed(m, proteins(1))))[1][-1] for m in (model, half))
    assert got.dtype == np.float32
    assert np.dot(exact, got) / np.linalg.norm(exact) / np.linalg.norm(got) > 0.999
