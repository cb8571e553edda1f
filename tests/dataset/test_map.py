"""Maps: the projection is that of a plain decomposition, each protein is there, and pages hold nothing foreign."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import esm_fast
from esm_fast.cli import main, map
from esm_fast.dataset import compute
from esm_fast.plots.colors import NO_VALUE, colors_of

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from embedded import fasta_of, proteins

from esm_fast.dataset.projection import pca, umap

ODD = [("</script><b>", "MKAV"), ("a&b$x_1$", "MKAL"), ("same", "MKAV")]


@pytest.fixture(scope="module")
def folder(fair_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("map")
    (folder / "in.fasta").write_text(fasta_of(proteins(40, seed=3) + ODD))
    arguments = ["embed", folder / "in.fasta", "-o", folder / "out", "--model", fair_checkpoint, "--layers", 0, -1]
    assert main([str(argument) for argument in [*arguments, "--unit-residues", 200]]) == 0
    return folder / "out"


@pytest.fixture
def drawn(folder, tmp_path, capsys):
    def run(name, *options):
        code = main(["map", str(folder), "-o", str(tmp_path / name), *strings(options)])
        return SimpleNamespace(code=code, path=tmp_path / name, **capsys.readouterr()._asdict())

    return run


def strings(items):
    return [str(item) for item in items]


def page_data(path):
    return json.loads(re.search(r"^const .* = (\{.*\});$", path.read_text(), re.MULTILINE)[1])


@pytest.mark.parametrize("layer", [0, -1])
def test_principal_components_are_those_of_a_plain_decomposition(folder, layer):
    data = esm_fast.open(folder)
    matrix = data.matrix(layer).astype(np.float64)
    _, first = np.unique(data.rows, return_index=True)
    center = matrix[first].mean(axis=0)
    _, values, directions = np.linalg.svd(matrix[first] - center, full_matrices=False)
    points, axes = pca(data, layer)
    for i in (0, 1):
        wanted = (matrix - center) @ directions[i]
        sign = np.sign(wanted @ points[:, i])
        np.testing.assert_allclose(points[:, i], sign * wanted, atol=1e-6 * np.abs(wanted).max())
        assert f"({values[i] ** 2 / (values**2).sum():.0%} of the variance)" in axes[i]
    assert (points[data.ids.index("same")] == points[data.ids.index("</script><b>")]).all()


def test_a_page_holds_every_protein_and_nothing_foreign(drawn, folder):
    result = drawn("map.html")
    assert result.code == 0 and "proteins  43 of 43" in result.out
    data, text = page_data(result.path), result.path.read_text()
    assert data["ids"] == esm_fast.open(folder).ids
    np.testing.assert_allclose(data["points"], pca(esm_fast.open(folder)).points, rtol=1e-5)
    assert not re.search(r"https?:|src=|url\(|@import", text)
    assert text.count("</script>") == 1


def test_a_table_with_long_cells_and_quotes_is_read(drawn, tmp_path):
    """UniProt's lists of variants are longer than csv's default limit, and hold quotes that mean nothing."""
    table = tmp_path / "t.tsv"
    table.write_text("Entry\tVariants\tFamily\np1\t" + 'V 12; "' * 30000 + '\talpha\np2\t"\tbeta\n')
    assert "2 with a value" in drawn("map.html", "--table", table, "--column", "Family").out


def test_a_picture_has_the_colours_of_the_table(drawn, tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    table = tmp_path / "t.tsv"
    table.write_text("Entry\tLength\tFamily\np1\t7\talpha $x_\np2\t8\tbeta\n\nnowhere\t1\tgamma\n")
    result = drawn("map.png", "--table", table, "--column", "Family")
    assert result.code == 0 and "coloured  2 with a value" in result.out
    pixels = (image.imread(result.path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    drawn_colors = {"#" + bytes(pixel.tolist()).hex() for pixel in np.unique(pixels, axis=0)}
    colors = colors_of(["alpha", "beta", ""], 3)
    assert set(colors.points) <= drawn_colors and "#009e73" not in drawn_colors  # the third word's
    page = drawn("map.html", "--table", table, "--column", "Family").path.read_text()
    assert "coloured by Family" in page and "alpha $x_ (1)" in page


def test_proteins_without_numbers_are_left_out_and_counted(fair_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compute, "_finite", lambda arrays: len(arrays[0]) and arrays[0][0] > np.median(arrays[0]))
    (tmp_path / "in.fasta").write_text(fasta_of(proteins(30, seed=1)))
    arguments = ["embed", tmp_path / "in.fasta", "-o", tmp_path / "o", "--model", fair_checkpoint]
    made = main([str(argument) for argument in [*arguments, "--dtype", "float32"]])
    monkeypatch.undo()
    assert made == 3
    data = esm_fast.open(tmp_path / "o")
    there = [name for name in data.ids if data.status(name) == "ok"]
    assert 0 < len(there) < 30
    assert main(["map", str(tmp_path / "o"), "-o", str(tmp_path / "m.html")]) == 3
    assert f"proteins  {len(there)} of 30" in capsys.readouterr().out
    assert page_data(tmp_path / "m.html")["ids"] == there


def test_umap_gets_each_sequence_once_and_a_seed(folder, monkeypatch):
    def fake(**options):
        assert options["random_state"] == 0 and options["metric"] == "cosine"
        return SimpleNamespace(fit_transform=lambda rows: rows[:, :2])

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=fake))
    data = esm_fast.open(folder)
    np.testing.assert_array_equal(umap(data).points, data.matrix()[:, :2])


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("map.jpg", [], "neither a .png nor a .html"),
        ("map.html", ["--column", "x"], "give --table"),
        ("map.html", ["--table", "t.tsv", "--column", "Famly"], "has no column 'Famly'; there are 'Entry', 'Family'"),
        ("map.html", ["--table", "other.tsv"], "'id' holds none of the data set's ids, such as 'p0'"),
        ("map.html", ["--table", "empty.tsv"], "line 1 names 0 columns"),
        ("map.html", ["--layer", "7"], "layer 7 is not stored"),
    ],
)
def test_refusals(drawn, tmp_path, monkeypatch, name, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.tsv").write_text("Entry\tFamily\np1\talpha\n")
    (tmp_path / "other.tsv").write_text("id\tFamily\nq1\talpha\n")
    (tmp_path / "empty.tsv").write_text("")
    result = drawn(name, *options)
    assert result.code == 1 and message in result.err and not result.path.exists()


@pytest.mark.parametrize("name, options, package", [("m.png", [], "plot"), ("m.html", ["--method", "umap"], "umap")])
def test_what_is_not_installed_is_named(drawn, monkeypatch, name, options, package):
    monkeypatch.setattr(map, "find_spec", lambda name: None)
    result = drawn(name, *options)
    assert result.code == 1 and f"pip install 'esm_fast[{package}]'" in result.err


def test_numbers_go_from_dark_to_light_and_rare_words_share_a_colour():
    numbers = colors_of([*strings(range(11)), ""], 12)
    assert (numbers.points[0], numbers.points[10], numbers.points[11]) == ("#440154", "#fde725", NO_VALUE)
    assert [text for text, _ in numbers.legend] == ["0", "5", "10", "no value"]
    words = colors_of([*"aabcdefghi"], 10)
    assert words.legend[0][0] == "a (2)" and words.legend[-1][0] == "2 others (2)"
    assert len(set(words.points)) == 8 and words.points[-1] == words.points[-2]
    assert colors_of(None, 2) == (["#3b6ea5"] * 2, [])
