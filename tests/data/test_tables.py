"""Tables of labels, variants and values whose cells could be read in two ways: refused, or read as their text."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esm_fast.cli import map as command
from esm_fast.cli.common import InputError
from esm_fast.train.examples import Example, ExamplesError, read_examples
from esm_fast.train.targets import Targets
from esm_fast.variants.rows import Collection
from esm_fast.variants.tables import Table

PROTEIN = "MKTVRQERLKSIVRILER"


def table(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def parquet(tmp_path, columns, names=None):
    path = tmp_path / "t.parquet"
    names = names or list(columns)
    pq.write_table(pa.Table.from_arrays(list(columns.values()), names=names), path)
    return path


def test_a_column_that_stands_twice_is_refused_by_every_form(tmp_path):
    """One of the two would be learned, and nobody would hear which."""
    rows = pa.array([PROTEIN]), pa.array(["1"]), pa.array(["2"])
    frame = pd.DataFrame([[PROTEIN, 1, 2]], columns=["sequence", "label", "label"])
    sources = [
        table(tmp_path, f"sequence,label, label\n{PROTEIN},1,2\n", "stripped.csv"),
        table(tmp_path, f"sequence,label,label\n{PROTEIN},1,2\n", "twice.csv"),
        table(tmp_path, f'{{"sequence": "{PROTEIN}", "label": 1, "label": 2}}\n', "t.jsonl"),
        parquet(tmp_path, dict(zip("abc", rows, strict=True)), ["sequence", "label", "label"]),
        frame,
    ]
    for source in sources:
        with pytest.raises(ExamplesError, match="names the column 'label' twice"):
            read_examples(source)
    for header in ("Sequence,sequence,label", "Label,LABEL,sequence"):
        with pytest.raises(ExamplesError, match=r"line 1: '.*' or '.*'\? Name one with --(sequence|label)-column"):
            read_examples(table(tmp_path, f"{header}\n{PROTEIN},{PROTEIN},1\n"))


@pytest.mark.parametrize("word", ["NA", "nan", "None", "NULL", "null"])
def test_a_missing_sequence_is_no_peptide(tmp_path, word):
    """Each is made of letters of residues: NA is Asn-Ala."""
    path = table(tmp_path, f"sequence,label\n{PROTEIN},1\n{word},2\n{PROTEIN}A,3\n")
    with pytest.raises(
        ExamplesError, match=f"line 3: sequence is '{word.upper()}', as programs write that there is no"
    ):
        read_examples(path)
    peptides = read_examples(table(tmp_path, f"sequence,label\nAG,1\n{word},2\nGAA,3\n"))
    assert [example.sequence for example in peptides] == ["AG", word.upper(), "GAA"]
    pairs = table(tmp_path, f"sequence_a,sequence_b,label\n{PROTEIN},{PROTEIN}A,1\n{PROTEIN},{word},2\n")
    with pytest.raises(ExamplesError, match="line 3: sequence_b is .*, as programs write that there is none"):
        read_examples(pairs, pairs=True)
    ids = read_examples(table(tmp_path, f"id,sequence,label\n{word},{PROTEIN},1\n007,{PROTEIN},2\n"))
    assert [example.name for example in ids] == [word, "007"]


def test_parquet_of_whatever_types_is_read_as_its_text(tmp_path):
    columns = {
        "id": pa.array([7, None, 12]),
        "sequence": pa.array([PROTEIN.encode()] * 3, pa.binary()),
        "label": pa.array(["a", "b", None]).dictionary_encode(),
        "split": pa.array(["train", "valid", "test"], pa.large_string()),
    }
    (folder := tmp_path / "label=3").mkdir()  # no column, though pyarrow would make one of it
    rows = read_examples(parquet(folder, columns))
    assert [(e.name, e.sequence, e.labels["label"], e.split) for e in rows] == [
        ("7", PROTEIN, "a", "train"),
        ("line 2", PROTEIN, "b", "valid"),
        ("12", PROTEIN, "", "test"),
    ]
    variants = Table(parquet(tmp_path, {"mutant": pa.array([b"K2A", None]), "flag": pa.array([True, None])}))
    assert list(variants.rows()) == [["K2A", "True"], ["", ""]]


def test_a_damaged_page_of_parquet_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    whole = pa.table({"sequence": [PROTEIN] * 50, "mutant": ["K2A"] * 50, "label": [f"{i}.5" for i in range(50)]})
    pq.write_table(whole, path, compression="none", use_dictionary=False, write_page_checksum=True)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"17.5", b"71.5", 1))
    assert path.read_bytes() != data
    with pytest.raises(ExamplesError, match=r"t\.parquet cannot be read as Parquet: .*CRC"):
        read_examples(path)
    with pytest.raises(OSError, match="CRC"):
        list(Table(path).rows())


@pytest.mark.parametrize("text", ["1_5", "1,5", "1.5.2", "0x10", "1e999", "--1", "Jan-15"])
def test_what_is_no_number_is_no_label(text):
    examples = [Example("a", PROTEIN, {"y": "1"}), Example("b", PROTEIN, {"y": text}, where="t.csv: line 3")]
    with pytest.raises(ExamplesError, match="t.csv: line 3: y"):
        Targets.fit("regression", "sequence", examples)


@pytest.mark.parametrize(("start", "problems"), [("3", 0), ("3.0", 0), ("3.7", 1), ("x", 1), ("1e999", 1), ("nan", 1)])
def test_where_a_pair_differs_is_a_whole_number(tmp_path, start, problems):
    rows = Collection({})
    rows._add_pair(0, PROTEIN, PROTEIN[:2] + "A" + PROTEIN[3:], "3")
    if problems:
        with pytest.raises(ValueError, match="start_pos is .* and no whole number"):
            rows._add_pair(1, PROTEIN, PROTEIN, start)
    else:
        rows._add_pair(1, PROTEIN, PROTEIN, start)


def test_values_of_a_map_are_one_an_id(tmp_path):
    path = table(tmp_path, "id\tkind\na\tx\nb\ty\na\tx\n", "t.tsv")
    assert command._values(path, None, ["a", "b"]) == ("kind", ["x", "y"])
    path.write_text("id\tkind\na\tx\nb\ty\na\tz\n")
    with pytest.raises(InputError, match=r"t.tsv: line 4: 'a' was there before, with another 'kind'"):
        command._values(path, None, ["a", "b"])
