"""The model that ships: trained weights, which know more of proteins than their composition."""

import contextlib
import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

import esm_fast
from esm_fast.alphabet import TOKENS
from esm_fast.cli import main
from esm_fast.sequences.fasta import read_fasta


@pytest.fixture(scope="module")
def language():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benches"))
        yield importlib.import_module("language")


@pytest.fixture(scope="module")
def proteins(language):
    records = [record for group in read_fasta(language.HELD_OUT) for record in group]
    return language.encode(records, 1022)


@pytest.fixture(scope="module")
def command(language, tmp_path_factory):
    """(what the command printed, the report it wrote) about the model that ships."""
    prefix, printed = tmp_path_factory.mktemp("language") / "report", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert language.main(["--out", str(prefix)]) == 0
    return printed.getvalue(), json.loads(prefix.with_suffix(".json").read_text())[0]


@pytest.fixture(scope="module")
def found(command):
    return command[1]


def test_held_out_proteins_are_likelier_than_shuffled_and_random_ones(found):
    assert found["perplexity"] <= 17 < found["wall: frequencies"]  # every masked residue shown as <mask>
    assert found["perplexity"] < found["shuffled"] < found["random"]


def test_masks_are_filled_better_than_by_the_most_common_residue(found):
    right = found["filled correctly"]
    spread = (right * (1 - right) / found["masked residues"]) ** 0.5
    assert right - found["most common residue"] > 3 * spread


def test_substitutions_are_like_blosum62(found):
    assert found["BLOSUM62, Spearman"] > 0.3 and found["BLOSUM62, p"] < 0.01


def test_a_model_of_frequencies_alone_meets_the_walls(language, proteins):
    """What the checks above would say of a model that has learned nothing but frequencies."""
    residues = np.concatenate(proteins)
    share = np.bincount(residues, minlength=len(TOKENS)) / len(residues)
    rng = np.random.default_rng(0)
    jitter = rng.normal(0, 1e-6, (len(residues), len(TOKENS)))
    with np.errstate(divide="ignore"):
        known = language.Predictions(residues, np.log(share) + jitter)
    assert known.perplexity == pytest.approx(known.wall, rel=1e-4)
    assert known.accuracy == pytest.approx(known.most_common)
    assert abs(language.likeness(language.substitutions(known), language.blosum62())[0]) < 0.3


def test_the_tool_itself(language):
    matrix = language.blosum62()
    at = {letter: i for i, letter in enumerate(language.AMINO_ACIDS)}
    known = {"IV": 3, "WC": -2, "DE": 2, "FY": 3, "AR": -1, "VY": -1, "GI": -4}
    assert all(matrix[at[a], at[b]] == matrix[at[b], at[a]] == value for (a, b), value in known.items())
    found, p = language.likeness(matrix, 3 * matrix + 1, permutations=200)
    assert found == pytest.approx(1) and p < 0.01
    proteins = [np.arange(4, 24)] * 3
    assert all(sorted(s) == sorted(proteins[0]) for s in language.shuffled(proteins))


def test_the_command(command):
    printed, found = command
    assert "BLOSUM62" in printed
    assert found["proteins"] == 200


def test_it_is_the_default_and_fills_masks_like_hugging_face(capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sequence = "QERLKSIVRILE<mask>SLGYNIVAT"
    assert main(["fill-mask", sequence, "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    tokenizer = esm_fast.ESMTokenizer.from_pretrained("esm1b_t6_demo")
    model = esm_fast.ESMForMaskedLM.from_pretrained("esm1b_t6_demo")
    theirs = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)(sequence)
    assert [answer["token_str"] for answer in ours] == [answer["token_str"] for answer in theirs]
    assert [answer["score"] for answer in ours] == pytest.approx([answer["score"] for answer in theirs], abs=1e-5)
