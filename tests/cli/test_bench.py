"""esm-fast bench: what it prints fits together; no test asserts a time."""

import json

import numpy as np

from esm_fast.cli import main
from esm_fast.cli.bench import _MOST, _evenly, _proteins


def test_each_type_is_timed_or_says_why_not(tmp_path, capsys):
    fasta = tmp_path / "few.fasta"
    fasta.write_text(">a\nMKTAYIAKQR\n>b\n\n>c\nMKVJ\n")
    assert main(["bench", str(fasta), "--json", "--seconds", "0.01"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["residues"] == 14 and found["machine"][0].startswith("esm_fast")
    assert [run["dtype"] for run in found["runs"]][:4] == ["float32", "bfloat16", "float16", "int8"]
    for run in found["runs"]:
        if "why_not" not in run:
            assert run["proteins"] == 2 and 0 < run["residues_per_second"] <= run["best"]
            np.testing.assert_allclose(run["estimated_seconds"] * run["residues_per_second"], 14)


def test_a_sample_of_a_large_file_is_bounded_and_even(tmp_path):
    fasta = tmp_path / "many.fasta"
    lengths = [1 + i % 7 for i in range(5 * _MOST)]
    fasta.write_text("".join(f">{i}\n{'A' * length}\n" for i, length in enumerate(lengths)))
    kept, total = _proteins(str(fasta))
    assert total == sum(lengths) and _MOST <= len(kept) <= 2 * _MOST
    np.testing.assert_allclose(np.mean([len(text) for text in kept]), np.mean(lengths), rtol=0.05)
    assert _evenly(list("abcdefgh"), 2) == ["c", "g"] and _evenly(["a"], 4) == ["a"]
