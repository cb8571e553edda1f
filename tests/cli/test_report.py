"""The report: it shows what the library computes, loads nothing, and a browser draws it in a narrow window."""

import base64
import html
import json
import re

import numpy as np
import pytest
from browser import dom, foreign

import esm_fast
from esm_fast import variants
from esm_fast.cli import main
from esm_fast.plots.heat_map import ORDER

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQMKTAYIAKQRXW"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "in.fasta").write_text(f">a<b>&\n{PROTEIN}\n>P2 other\nMKVLAA\n")
    arguments = [str(folder / "in.fasta"), "--model", "esm1b_t6_demo", "--dtype", "float32"]
    assert main(["embed", *arguments, "-o", f"{folder}/set/"]) == 0
    report = ["report", *arguments, "-o", str(folder / "r.html"), "--data-set", f"{folder}/set", "-k", "2"]
    assert main(report) == 0
    return folder / "r.html"


def test_its_numbers_are_the_librarys(written):
    text = written.read_text()
    model, _ = esm_fast.load("esm1b_t6_demo", device="cpu")
    first = html.unescape(re.search(r'srcdoc="([^"]*)"', text)[1])
    data = json.loads(re.search(r"^const \{.*\} = (\{.*\});$", first, re.MULTILINE)[1])
    scan = variants.scan(model, PROTEIN, strategy="masked")
    columns = "ACDEFGHIKLMNPQRSTVWY"
    for row, letter in enumerate(ORDER):
        np.testing.assert_allclose(data["scores"][row], scan[:, columns.index(letter)], rtol=2e-3, atol=1e-5)
    (perplexity,) = variants.pseudo_perplexity(model, [PROTEIN])
    assert f"pseudo-perplexity {perplexity:.2f}" in text
    best = np.where([[c == own for c in columns] for own in PROTEIN], -np.inf, scan)
    at, new = np.unravel_index(best.argmax(), best.shape)
    assert f"<td>{PROTEIN[at]}{at + 1}{columns[new]}</td>" in text
    logs = variants.log_probs(model, PROTEIN, True)[:, [model.alphabet.get_idx(c) for c in columns]]
    p = np.exp(logs[5]) / np.exp(logs[5]).sum()
    assert f"<title>6: {-(p * np.log2(p)).sum():.2f}</title>" in text
    values = np.frombuffer(base64.b64decode(re.search(r'data-values="([^"]*)"', text)[1]), np.uint8)
    tokens = model.alphabet.get_batch_converter()([("", PROTEIN)])[2]
    contacts = model.predict_contacts(tokens)[0].detach().numpy()
    np.testing.assert_allclose(values.reshape(contacts.shape) / 255, contacts, atol=3e-3)


def test_it_loads_nothing_and_escapes_names(written):
    text = written.read_text()
    assert not foreign(text) and "a<b>" not in text and "a&lt;b&gt;&amp;" in text
    assert "chains it was not fitted to" in text
    assert re.search(r"<tr><td>P2</td><td class=\"number\">1\.0000</td>", text)  # itself is its nearest


@pytest.mark.parametrize("size", ["1000,800", "500,700"])
def test_a_browser_draws_it_in_wide_and_narrow_windows(written, tmp_path, size):
    text = written.read_text()
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    inner = 'frames[0].document.querySelectorAll("main canvas").length'
    check = f"<script>onload = () => {{ document.body.dataset.fits = {wide}; document.body.dataset.lines = {inner}; }};"
    (tmp_path / "r.html").write_text(text + check + "</script>")
    shown = dom(tmp_path / "r.html", tmp_path, size)
    assert f'data-drawn="{len(PROTEIN) ** 2}"' in shown and 'data-drawn="36"' in shown
    assert 'data-fits="true"' in shown
    assert int(re.search(r'data-lines="(\d+)"', shown)[1]) >= 1


def test_many_proteins_and_a_long_one(tmp_path, capsys):
    (tmp_path / "many.fasta").write_text("".join(f">{i}\nMKV\n" for i in range(21)))
    assert main(["report", str(tmp_path / "many.fasta"), "-o", str(tmp_path / "o.html")]) == 1
    assert "at most 20 proteins" in capsys.readouterr().err
    (tmp_path / "long.fasta").write_text(f">long\n{'MKTAYIAKQR' * 103}\n")
    assert main(["report", str(tmp_path / "long.fasta"), "-o", str(tmp_path / "o.html"), "--scan", "wt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["residues"] == 1030
    assert "more than the 1,022 residues" in (tmp_path / "o.html").read_text()
