"""esm-fast extract against fair-esm: the same model run as scripts/extract.py runs it, the same files."""

import pytest
import torch

from esm_fast.cli import main

RECORDS = [
    ("sp|P69905|HBA_HUMAN Hemoglobin subunit alpha", "MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQVKGHG"),
    ("short", "MK"),
    ("with a mask", "MKTAY<mask>KQRQISF<mask>"),
    ("one", "M"),
    ("rare", "XBUZO.-ACDEFGHIKLMNPQRSTVWY"),
]
ALL = ["mean", "per_tok", "bos", "contacts"]


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{label}\n{sequence}\n" for label, sequence in RECORDS))
    return path


def extract(checkpoint, fasta, out, *options):
    return main(["extract", str(checkpoint), str(fasta), str(out), "--nogpu", *map(str, options)])


def load(path):
    return torch.load(path, weights_only=True)


def fair_esm_extract(model, label, sequence, layers, truncation=1022):
    """What scripts/extract.py computes for one record, with the number of residues counted in tokens."""
    import esm

    converter = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter(truncation)
    _, _, tokens = converter([(label, sequence)])
    with torch.no_grad():
        out = model(tokens, repr_layers=layers, return_contacts=True)
    residues = tokens.shape[1] - 2
    return {
        "label": label,
        "representations": {n: x[0, 1 : residues + 1] for n, x in out["representations"].items()},
        "mean_representations": {n: x[0, 1 : residues + 1].mean(0) for n, x in out["representations"].items()},
        "bos_representations": {n: x[0, 0] for n, x in out["representations"].items()},
        "contacts": out["contacts"][0, :residues, :residues],
    }


def assert_same(got, wanted):
    assert set(got) == set(wanted) and got["label"] == wanted["label"]
    for kind in set(wanted) - {"label", "contacts"}:
        assert set(got[kind]) == set(wanted[kind])
        for layer, tensor in wanted[kind].items():
            assert got[kind][layer].dtype == torch.float32
            torch.testing.assert_close(got[kind][layer], tensor, rtol=0, atol=1e-4)
    torch.testing.assert_close(got["contacts"], wanted["contacts"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [10, 4096])
def test_files_hold_what_fair_esm_computes(fair_model, fair_checkpoint, fasta, tmp_path, batch):
    options = ["--repr_layers", 0, 2, -1, "--include", *ALL, "--toks_per_batch", batch]
    assert extract(fair_checkpoint, fasta, tmp_path / "out", *options) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{label}.pt" for label, _ in RECORDS}
    for label, sequence in RECORDS:
        wanted = fair_esm_extract(fair_model, label, sequence, [0, 2, 3])
        assert_same(load(tmp_path / "out" / f"{label}.pt"), wanted)


def test_truncation_is_fair_esms(fair_model, fair_checkpoint, fasta, tmp_path, capsys):
    options = ["--include", *ALL, "--truncation_seq_length", 8]
    assert extract(fair_checkpoint, fasta, tmp_path / "out", *options) == 0
    for label, sequence in RECORDS:
        wanted = fair_esm_extract(fair_model, label, sequence, [3], truncation=8)
        assert_same(load(tmp_path / "out" / f"{label}.pt"), wanted)
    assert "3 truncated" in capsys.readouterr().out


@pytest.mark.parametrize("include", ["mean", "per_tok", "bos", "contacts"])
def test_only_what_is_asked_for_is_written(fair_checkpoint, fasta, tmp_path, include):
    assert extract(fair_checkpoint, fasta, tmp_path / "out", "--include", include) == 0
    key = {"mean": "mean_representations", "per_tok": "representations", "bos": "bos_representations"}.get(include)
    assert set(load(tmp_path / "out" / "one.pt")) == {"label", key or "contacts"}


def test_existing_files_are_left_and_cut_ones_written_again(fair_checkpoint, fasta, tmp_path, capsys):
    out = tmp_path / "out"
    extract(fair_checkpoint, fasta, out, "--include", "mean")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    whole = (out / "one.pt").read_bytes()
    (out / "one.pt").write_bytes(whole[:100])
    (out / "short.pt").unlink()
    capsys.readouterr()
    assert extract(fair_checkpoint, fasta, out, "--include", "mean") == 0
    text = capsys.readouterr().out
    assert "proteins  2 of 5 records" in text and "3 already done" in text
    assert load(out / "one.pt")["mean_representations"][3].shape == (32,)
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} == {"one.pt", "short.pt"}
    assert extract(fair_checkpoint, fasta, out, "--include", "mean") == 0
    assert "proteins  0 of 5 records" in capsys.readouterr().out


def test_every_label_has_a_file_of_its_own(fair_checkpoint, tmp_path):
    labels = ["a/b", "..", ".", "../up", "x:y", "z" * 300, "蛋白質", "twice", "twice", "twice_2", "100%"]
    fasta, out = tmp_path / "in.fa", tmp_path / "deep" / "out"
    fasta.write_text("".join(f">{label}\nMK{'A' * i}\n" for i, label in enumerate(labels)))
    assert extract(fair_checkpoint, fasta, out, "--include", "per_tok") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "in.fa"]
    assert all(path.is_file() and path.suffix == ".pt" for path in out.iterdir())
    contents = [load(path) for path in out.iterdir()]
    found = sorted((content["label"], len(content["representations"][3])) for content in contents)
    assert found == sorted((label, 2 + i) for i, label in enumerate(labels))


def test_lower_case_is_read_as_residues(fair_model, fair_checkpoint, tmp_path):
    (tmp_path / "in.fa").write_text(">a\nmktay\n")
    extract(fair_checkpoint, tmp_path / "in.fa", tmp_path / "out", "--include", *ALL)
    assert_same(load(tmp_path / "out" / "a.pt"), fair_esm_extract(fair_model, "a", "MKTAY", [3]))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (">a\nMK\n>b\nMJK\n", [], "record 2 (line 3, 'b'), column 2: 'J'"),
        (">a\n>b\nMK\n", [], "record 1 (line 1, 'a'): it has no residues"),
        (f">a\n{'M' * 1100}\n", ["--truncation_seq_length", 2000], "1100 residues and the limit is 1022"),
        (">a\nMK\n", ["--repr_layers", 4], "layer 4 does not exist"),
        ("MK\n", [], "before the first '>'"),
    ],
)
def test_errors_come_before_any_file(fair_checkpoint, tmp_path, capsys, text, options, message):
    (tmp_path / "in.fa").write_text(text)
    assert extract(fair_checkpoint, tmp_path / "in.fa", tmp_path / "out", "--include", "mean", *options) == 1
    error = capsys.readouterr().err
    assert message in error and "--unknown" not in error and "--overlength" not in error
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("options", [[], ["--include", "none"], ["--include", "mean", "--toks_per_batch", "0"]])
def test_wrong_arguments_exit_with_2(fair_checkpoint, fasta, tmp_path, options):
    with pytest.raises(SystemExit) as caught:
        extract(fair_checkpoint, fasta, tmp_path / "out", *options)
    assert caught.value.code == 2
