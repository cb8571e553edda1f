"""esm-fast variants and predict.py's stand-in: formats in and out, rows and columns kept, what is refused."""

import csv
import gzip
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from esm_fast import variants
from esm_fast.cli import main
from esm_fast.variants import predict
from esm_fast.variants.formats import BRANDES_ORDER
from esm_fast.variants.tables import Table

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEV"
STANDARD = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture
def command(tmp_path, fair_checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.fasta").write_text(f">sp|P1|NAME one\n{PROTEIN}\n")
    (tmp_path / "two.fasta").write_text(f">P1\n{PROTEIN}\n>P2 other\n{PROTEIN[:12]}\n")

    def run(*arguments, fasta=("p.fasta",), out="out.csv", model=(fair_checkpoint,)):
        capsys.readouterr()
        code = main(
            [
                str(a)
                for a in ["variants", *fasta, "-o", out, "--force", "--dtype", "float32", *arguments, "--model", *model]
            ]
        )
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err, path=tmp_path / out)

    return run


def read(path):
    with path.open(newline="") as file:
        return list(csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def test_all_substitutions_are_a_table(command, ours):
    result = command()
    rows = read(result.path)
    assert result.code == 0 and "rows      608 in" in result.out
    assert rows[0] == ["seq_id", "mut_name", "esm_score"] and len(rows) == 1 + 19 * len(PROTEIN)
    expected = variants.score(ours, PROTEIN, [name for _, name, _ in rows[1:]])
    np.testing.assert_allclose([float(score) for *_, score in rows[1:]], expected, atol=1e-6)
    assert {name for name, *_ in rows[1:]} == {"P1"}


def test_the_matrix_is_esm_variants_own_and_can_be_read_again(command, ours):
    command("--format", "matrix", "--strategy", "masked")
    rows = read(command("--format", "matrix", "--strategy", "masked").path)
    assert rows[0] == ["", *(f"{residue} {i + 1}" for i, residue in enumerate(PROTEIN))]
    assert "".join(row[0] for row in rows[1:]) == BRANDES_ORDER
    scan = variants.scan(ours, PROTEIN, strategy="masked")
    for row in rows[1:]:
        np.testing.assert_allclose(np.array(row[1:], float), scan[:, STANDARD.index(row[0])], atol=1e-6)
    again = read(command("--variants", "out.csv", "--strategy", "masked", out="again.csv").path)
    assert again[0][:2] == ["mut_name", "given_score"] and len(again) == 1 + 20 * len(PROTEIN)
    assert again[1][0] == "M1K" and all(float(given) == float(found) for _, given, found in again[1:])


@pytest.mark.parametrize(
    "form, ending", [("long", ".csv"), ("proteingym", ".csv.gz"), ("mavedb", ".parquet"), (None, ".tsv")]
)
def test_every_form_written_is_read_again(command, form, ending):
    if ending == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    result = command(*(["--format", form] if form else []), fasta=["two.fasta"], out="all" + ending)
    assert result.code == 0
    again = command("--variants", "all" + ending, fasta=["two.fasta"], out="again.csv")
    assert again.code == 0, again.err
    before, after = Table(result.path), read(again.path)
    assert after[0][:-1] == before.columns and len(after) == 1 + 19 * (32 + 12)
    for given, row in zip(before.rows(), after[1:], strict=True):
        assert row[:-1] == given and abs(float(row[-1]) - float(given[-1])) < 1e-6


def test_tables_keep_rows_order_and_columns(command, ours):
    choose = random.Random(1)
    names = [f"{PROTEIN[i]}{i + 1}{choose.choice(STANDARD)}" for i in choose.choices(range(32), k=50)]
    names += [f"{PROTEIN[0]}1W:{PROTEIN[5]}6A"]
    rows = [["", "DMS_score", "mutant", "note"]] + [[str(i), repr(i / 7), n, 'a,"b"'] for i, n in enumerate(names)]
    with open("in.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
    found = read(command("--variants", "in.csv", "--strategy", "masked").path)
    assert [row[:-1] for row in found] == rows and found[0][-1] == "tiny"
    expected = variants.score(ours, PROTEIN, names, strategy="masked")
    np.testing.assert_allclose([float(row[-1]) for row in found[1:]], expected, atol=1e-6)


@pytest.mark.parametrize(
    "text, name",
    [
        ("hgvs_pro,score\np.Met1Pro,0.5\np.[Met1Pro;Lys2Ala],1\np.=,2\n_wt,3\n", "maves.csv"),
        (
            "# Copyright\n# more\nuniprot_id\tprotein_variant\tam_pathogenicity\tam_class\nP1\tM1P\t0.9\tpathogenic\n",
            "am.tsv",
        ),
        ("M1P\nK2A\n\nK2A\n", "list.txt"),
        ("mutant;effect\nM1P:K2A;1\nM1P,K2A;1\n", "semi.csv"),
    ],
)
def test_forms_that_others_write(command, ours, text, name):
    with open(name, "w") as file:
        file.write(text)
    result = command("--variants", name, out="o.tsv")
    assert result.code == 0, result.err
    table = Table(result.path)
    assert table.comments == [line for line in text.splitlines() if line.startswith("#")]
    column = table.columns.index(next(c for c in ("hgvs_pro", "protein_variant", "mutant") if c in table.columns))
    rows = list(table.rows())
    expected = variants.score(ours, PROTEIN, [row[column] for row in rows])
    np.testing.assert_allclose([float(row[-1]) for row in rows], expected, atol=1e-6)


def test_pairs_bring_their_wild_types(command, ours):
    with open("pairs.csv", "w") as file:
        file.write(
            f"wt_seq,mut_seq,start_pos\n{PROTEIN},{PROTEIN[:4]}{PROTEIN[6:]},5\n{PROTEIN[:9]},W{PROTEIN[1:9]},1\n"
        )
    rows = read(command("--variants", "pairs.csv", "--strategy", "pllr", fasta=[]).path)
    expected = [
        variants.score(ours, PROTEIN, ["Y5_I6del"], strategy="pllr")[0],
        variants.score(ours, PROTEIN[:9], ["M1W"], strategy="pllr")[0],
    ]
    np.testing.assert_allclose([float(row[-1]) for row in rows[1:]], expected, atol=1e-6)


def test_rows_of_several_proteins_and_files(command, ours):
    with open("a.csv", "w") as file:
        file.write("seq_id,mut_name\nP2,M1P\nP1,V32A\n")
    with open("b.csv", "w") as file:
        file.write("mutant,x\nP1:p.Met1Pro,7\n")
    result = command("--variants", "a.csv", "b.csv", fasta=["two.fasta"])
    rows = read(result.path)
    assert rows[0] == ["seq_id", "mut_name", "mutant", "x", "file", "tiny"]
    assert [row[:5] for row in rows[1:]] == [
        ["P2", "M1P", "", "", "a.csv"],
        ["P1", "V32A", "", "", "a.csv"],
        ["", "", "P1:p.Met1Pro", "7", "b.csv"],
    ]
    expected = [
        variants.score(ours, p, [v])[0] for p, v in ((PROTEIN[:12], "M1P"), (PROTEIN, "V32A"), (PROTEIN, "M1P"))
    ]
    np.testing.assert_allclose([float(row[-1]) for row in rows[1:]], expected, atol=1e-6)


def test_rows_that_do_not_fit_are_errors_or_kept_and_counted(command):
    with open("in.csv", "w") as file:
        file.write("mutant,mutated_sequence\n" + "\n".join([
            "M1P,", "A1P,", "M99P,", "nonsense,", "M1P,", "M1M,", ",", "p.Met1del,", f"K2A,{PROTEIN}",
            f"K2A,MA{PROTEIN[2:]}",
        ]) + "\n")  # fmt: skip
    refused = command("--variants", "in.csv")
    assert refused.code == 1 and not refused.path.exists()
    assert "in.csv: row 2, column 'mutant': A1P: position 1 is stated as A, and the protein has M" in refused.err
    assert "no other offset fits more" in refused.err and "--invalid keep" in refused.err
    kept = command("--variants", "in.csv", "--invalid", "keep")
    rows = read(kept.path)[1:]
    assert kept.code == 3 and len(rows) == 10
    assert [bool(row[2]) for row in rows] == [True, False, False, False, True, True, False, False, False, True]
    assert [bool(row[3]) for row in rows] == [not row[2] for row in rows]
    for words in ("10: ", "2 duplicate", "1 synonymous", "1 other wild type", "1 out of range", "1 empty",
                  "1 not understood", "1 not for this strategy", "1 other mutated_sequence"):  # fmt: skip
        assert words in kept.out, words


def test_an_offset_is_found_or_advised(command):
    with open("in.csv", "w") as file:
        file.write("mutant\n" + "".join(f"{r}{i + 24}A\n" for i, r in enumerate(PROTEIN)))
    assert "--offset 23 would fit 32 of 32 rows" in command("--variants", "in.csv").err
    found = command("--variants", "in.csv", "--offset", "auto")
    assert found.code == 0 and "offset    23 (found)" in found.out
    assert read(found.path) == read(command("--variants", "in.csv", "--offset", "23").path)


def test_tables_as_programs_save_them(command, ours):
    """Header in another case, UTF-16, columns without a name or with one twice, ids as UniProt's headers have them."""
    rows = ["sEQ_id\t Mutant \tx\tx\t", "sp|P2|NAME\tM1P\t1\t2\t3", " P1\tV32A\t4\t5\t6"]
    with open("excel.txt", "wb") as file:
        file.write("\r\n".join([*rows, ""]).encode("utf-16"))
    with open("b.csv", "w") as file:
        file.write("x,mutant,x\n7,P1:p.Met1Pro,8\n")
    result = command("--variants", "excel.txt", "b.csv", fasta=["two.fasta"])
    found = read(result.path)
    assert found[0] == [*rows[0].split("\t"), "mutant", "file", "tiny"]
    assert [row[2:7] for row in found[1:]] == [
        ["1", "2", "3", "", "excel.txt"],
        ["4", "5", "6", "", "excel.txt"],
        ["7", "8", "", "P1:p.Met1Pro", "b.csv"],
    ]
    with open("b.csv", "w") as file:
        file.write("x,mutant\n7,P1:p.Met1Pro\n8,P1:p.Lys1Pro\n")
    refused = command("--variants", "excel.txt", "b.csv", fasta=["two.fasta"]).err
    assert "b.csv: row 2, column 'mutant': P1:p.Lys1Pro: position 1 is stated as K" in refused


def test_mutated_sequences_alone_are_variants(command, ours):
    """ProteinGym's insertions and deletions."""
    with open("in.csv", "w") as file:
        file.write(f"mutated_sequence,DMS_score\n{PROTEIN[:3]}{PROTEIN[4:]},1\n{PROTEIN},2\n,3\n{PROTEIN}1,4\n")
    result = command("--variants", "in.csv", "--strategy", "pllr", "--invalid", "keep")
    rows = read(result.path)[1:]
    expected = variants.score(ours, PROTEIN, ["A4del", "="], strategy="pllr")
    np.testing.assert_allclose([float(row[2]) for row in rows[:2]], expected, atol=1e-6)
    assert result.code == 3 and [bool(row[3]) for row in rows] == [False, False, True, True]
    assert "1 wild type" in result.out and "1 empty" in result.out and "column 33" in rows[3][3]


def test_the_summary_as_json(command):
    with open("in.txt", "w") as file:
        file.write("M1P\nM1P\nA1P\n")
    kept = command("--variants", "in.txt", "--invalid", "keep", "--json")
    said = json.loads(kept.out)
    assert kept.code == 3 and said["rows"] == 3 and said["not_scored"] == 1 and said["strategy"] == ["wt"]
    assert said["counted"] == {"duplicate": 1, "other wild type": 1} and said["dtype"] == ["float32"]
    assert said["random_weights"] is False
    assert json.loads(command("--json").out)["rows"] == 19 * len(PROTEIN)


def test_several_models_and_likelihoods_have_their_columns(command, fair_checkpoint, ours):
    with open("in.txt", "w") as file:
        file.write("M1P\nK2A\n")
    rows = read(command("--variants", "in.txt", model=[fair_checkpoint, fair_checkpoint], out="m.csv").path)
    assert rows[0] == ["mutant", "tiny", "tiny_2", "mean"] and rows[1][1] == rows[1][2] == rows[1][3]
    rows = read(command("--variants", "in.txt", "--strategy", "pseudo-ppl").path)
    assert rows[0] == ["mutant", "tiny", "tiny_wild_type", "tiny_difference"]
    pll, base = (variants.score(ours, PROTEIN, [name], strategy="pll")[0] for name in ("K2A", "="))
    np.testing.assert_allclose(np.array(rows[2][1:], float), [pll, base, pll - base], atol=1e-6)


def test_several_strategies_have_a_column_each(command, fair_checkpoint, ours):
    with open("in.txt", "w") as file:
        file.write("M1P:K2A\nK2A\np.Ala4del\n")
    assert (
        "row 3, column 'mutant': p.Ala4del: wt has no score"
        in command("--variants", "in.txt", "--strategy", "wt,pllr").err
    )
    result = command("--variants", "in.txt", "--strategy", "pllr, wt,masked", "--invalid", "keep")
    rows = read(result.path)
    assert result.code == 3 and "3: 2 not for this" not in result.out and "1 not for this strategy" in result.out
    assert rows[0] == ["mutant", "tiny_pllr", "tiny_wt", "tiny_masked", "not_scored_because"]
    assert rows[3][1] and rows[3][2:4] == ["", ""] and "another length" in rows[3][4] and not rows[1][4]
    expected = variants.score(ours, PROTEIN, ["M1P:K2A", "K2A"], strategy=["pllr", "wt", "masked"])
    np.testing.assert_allclose(np.array([row[1:4] for row in rows[1:3]], float).T, expected, atol=1e-6)
    assert "several are for --variants" in command("--strategy", "wt,masked").err
    assert "choose one of" in command("--strategy", "wt,").err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--strategy", "best"], "strategy is 'best'; choose one of masked"),
        (["--variants", "none.csv"], "No such file"),
        (["--variants", "odd.csv"], "none of its columns (a, b) is one for variants"),
        (["--variants", "odd.csv", "--variant-col", "c"], "has no column 'c'; there are a, b"),
        (["--variants", "quote.csv"], "the row at line 3 cannot be read"),
        (["--variants", "book.csv"], "is an Excel workbook or a zip archive; save the table as CSV"),
        (["--variants", "same.csv"], "has 2 columns 'mutant'"),
        (["--variants", "ragged.csv"], "line 3 has 1 cells, and the header 2"),
        (["--variants", "empty.csv"], "the file is empty"),
        (["--variants", "bytes.csv"], "no table that can be read"),
        (["--variants", "cut.csv.gz"], "no table that can be read: the gz stream is cut short"),
        (["--variants", "list.txt", "--format", "long"], "are for all substitutions"),
    ],
)
def test_refusals(command, tmp_path, arguments, words):
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    (tmp_path / "ragged.csv").write_text("mutant,b\nM1P,2\nM1P\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "quote.csv").write_text('mutant,b\nM1P,1\nM1P,"2\nK2A,3\n')
    (tmp_path / "book.csv").write_bytes(b"PK\x03\x04" + bytes(99))
    (tmp_path / "same.csv").write_text("mutant,mutant\nM1P,K2A\n")
    (tmp_path / "bytes.csv").write_bytes(b"mutant\n\xff\xfe\n")
    (tmp_path / "list.txt").write_text("M1P\n")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"mutant\nM1P\n")[:-9])
    result = command(*arguments)
    assert result.code == 1 and words in result.err and not result.path.exists(), result.err


def test_predict_writes_what_fair_esms_script_writes(tmp_path, fair_model, fair_checkpoint, capsys):
    import variant_formulas as formulas

    text = PROTEIN[:14]
    rows = [["mutant", "effect"]] + [[f"{text[i]}{i + 24}W", str(i)] for i in (0, 5, 13)]
    with gzip.open(tmp_path / "in.csv.gz", "wt") as file:
        csv.writer(file).writerows(rows)
    for strategy, formula in (
        ("wt-marginals", formulas.wt),
        ("masked-marginals", formulas.masked),
        ("pseudo-ppl", None),
    ):
        arguments = ["--model-location", fair_checkpoint, "--sequence", text, "--dms-input", tmp_path / "in.csv.gz"]
        arguments += ["--mutation-col", "mutant", "--dms-output", tmp_path / "o.csv", "--offset-idx", 24, "--nogpu"]
        extra = ["--compat"] if formula is None else []
        assert predict.main([str(a) for a in [*arguments, "--scoring-strategy", strategy, *extra]]) == 0
        found = read(tmp_path / "o.csv")
        assert found[0] == ["", "mutant", "effect", str(fair_checkpoint)]
        assert [row[:3] for row in found[1:]] == [[str(i), *row] for i, row in enumerate(rows[1:])]
        changes = [[(text[i], i + 1, "W")] for i in (0, 5, 13)]
        if formula is None:
            expected = [formulas.pll_off_by_one(fair_model, formulas.mutated(text, change)) for change in changes]
        else:
            expected = [formula(fair_model, text, change) for change in changes]
        np.testing.assert_allclose([float(row[3]) for row in found[1:]], expected, rtol=0, atol=1e-4)
    wrong = [str(a) for a in [*arguments[:-3], "--offset-idx", 23]]
    assert predict.main(wrong) == 1 and "; --offset-idx 24 would fit 3 of 3 rows" in capsys.readouterr().err


def test_ids_that_are_there_twice(command):
    with open("twice.fasta", "w") as file:
        file.write(f">P1\n{PROTEIN[:3]}\n>P1\n{PROTEIN[:4]}\n>P3\nMKUX\n")
    result = command(fasta=["twice.fasta"])
    assert {row[0] for row in read(result.path)[1:]} == {"P1", "P1_2", "P3"} and "2 residues U, O" in result.out
    skipped = command("--duplicates", "skip", fasta=["twice.fasta"])
    assert "1 duplicate" in skipped.out and len(read(skipped.path)) == 1 + 19 * 3 + 20 * 2 + 19 * 2
    refused = command("--duplicates", "error", fasta=["twice.fasta"]).err
    assert "twice.fasta: record 2 (line 3): the id 'P1' was there before" in refused and "--duplicates skip" in refused
    assert "has more than 5 bytes" in command("--max-record", 5, fasta=["twice.fasta"]).err
    with open("gaps.fasta", "w") as file:
        file.write(">P1\nMK-T\n")
    assert "'P1'), column 3: '-' is a gap" in command(fasta=["gaps.fasta"]).err
    kept = command("--gaps", "keep", fasta=["twice.fasta", "gaps.fasta"]).err
    assert "gaps.fasta: record 1 (P1_3), column 3: '-' is not a residue whose variants" in kept
    removed = command("--gaps", "remove", fasta=["gaps.fasta"])
    assert len(read(removed.path)) == 1 + 19 * 3 and "1 gaps removed" in removed.out
