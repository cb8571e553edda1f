"""Heat maps: a picture in the right colours; a page that a browser lays out, wraps and answers on, without network."""

import json
import re

import numpy as np
import pytest
from browser import dom

from esm_fast.plots.heat_map import COLUMNS, ORDER, STOPS, HeatMap


@pytest.fixture(scope="module")
def drawn(protein):
    text, choose = protein(230), np.random.default_rng(0)
    scan = choose.normal(-3, 2, (230, 20))
    scan[np.arange(230), [COLUMNS.index(residue) for residue in text]] = 0
    return HeatMap("a<b>&</script>", text, scan, "wt, $x_1$")


def test_a_page_holds_every_score_and_nothing_foreign(drawn, tmp_path):
    drawn.write(tmp_path / "map.html")
    text = (tmp_path / "map.html").read_text()
    data = json.loads(re.search(r"^const \{.*\} = (\{.*\});$", text, re.MULTILINE)[1])
    assert data["protein"] == drawn.protein and data["order"] == ORDER
    np.testing.assert_allclose(np.array(data["scores"]), drawn.rows(), rtol=1e-3)
    np.testing.assert_allclose(drawn.rows()[ORDER.index("W"), 7], drawn.scan[7, COLUMNS.index("W")])
    assert not re.search(r"https?:|src=|url\(|@import", text) and text.count("</script>") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.html"]


def test_a_picture_has_the_colours_of_the_extremes(drawn, tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    drawn.write(tmp_path / "map.png")
    pixels = (image.imread(tmp_path / "map.png")[..., :3] * 255).round().astype(int)
    colors = {tuple(pixel) for pixel in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}
    assert {STOPS[0], STOPS[3], STOPS[-1]} <= colors


def test_colours_differ_for_every_kind_of_colour_vision():
    """Worse and better differ in blue against yellow, which red-green blindness leaves; dark means strong."""
    low, high = np.array(STOPS[:3], float), np.array(STOPS[:3:-1], float)
    assert ((low[:, 0] - low[:, 2]) > 60).all() and ((high[:, 2] - high[:, 0]) > 0).all()
    luminance = np.array(STOPS, float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance[:4]) > 0).all() and (np.diff(luminance[3:]) < 0).all()


@pytest.fixture
def browse(tmp_path):
    def run(heat_map, script, size="900,700"):
        """What the page's body is after a script has run in it."""
        heat_map.write(tmp_path / "map.html")
        page = (tmp_path / "map.html").read_text().replace("layOut();\n</script>", f"layOut();\n{script}\n</script>")
        (tmp_path / "tried.html").write_text(page)
        shown = dom(tmp_path / "tried.html", tmp_path, size)
        return re.search(r"<output>(.*?)</output>", shown)[1], re.findall(r"<canvas[^>]*data-start[^>]*>", shown)

    return run


POINT = """
const line = [...document.querySelectorAll("main canvas")].find(
  c => +c.dataset.start <= AT && AT < +c.dataset.start + +c.dataset.count);
line.scrollIntoView();
const box = line.getBoundingClientRect();
line.dispatchEvent(new MouseEvent("mousemove", {bubbles: true,
  clientX: box.left + left + (AT - line.dataset.start + 0.5) * cell, clientY: box.top + track + (ROW + 0.5) * cell}));
"""


@pytest.mark.parametrize("at, new", [(0, "W"), (57, "K"), (229, "C")])
def test_a_browser_shows_variant_and_score_under_the_pointer(browse, drawn, at, new):
    shown, lines = browse(drawn, POINT.replace("AT", str(at)).replace("ROW", str(ORDER.index(new))))
    own, score = drawn.protein[at], drawn.scan[at, COLUMNS.index(new)]
    if own == new:
        assert shown.startswith(f"{own}{at + 1}: the wild type")
    else:
        assert shown.startswith(f"{own}{at + 1}{new}: {float(f'{score:.4g}')}")
    assert f"(mean of residue {own}{at + 1}: " in shown
    assert len(lines) == 4  # 230 residues, 70 a line of 900 pixels


def test_five_thousand_residues_wrap_in_a_narrow_window(browse, protein):
    text = protein(5000, seed=1)
    heat_map = HeatMap("long", text, np.random.default_rng(1).normal(-2, 1, (5000, 20)), "wt")
    shown, lines = browse(heat_map, POINT.replace("AT", "4999").replace("ROW", "3"), size="520,600")
    assert shown.startswith(f"{text[4999]}5000{ORDER[3]}") or "the wild type" in shown
    counts = [int(re.search(r'data-count="(\d+)"', line)[1]) for line in lines]
    assert sum(counts) == 5000 and max(counts) <= 45 and len(lines) > 100
