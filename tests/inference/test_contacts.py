"""Contact regressions: the published fit on the model's maps, structures read right, files that know their model."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import hf_model, save_fair_esm
from safetensors.torch import load_file, save_file

import esm_fast
from esm_fast import weights
from esm_fast.cli import main
from esm_fast.contacts import Structure, features, precisions, read_structures
from esm_fast.contacts.fit import _logistic

pytest.importorskip("gemmi", reason="gemmi is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
STRUCTURES = sorted((Path(__file__).resolve().parents[2] / "examples" / "structures").glob("*.pdb.gz"))
FIT = [*map(str, STRUCTURES[:4]), "--pairs", "2000", "--c", "10"]
NAMES = ("contact_head.regression.weight", "contact_head.regression.bias")


def test_the_features_are_those_that_the_model_predicts_from(fair_checkpoint):
    model, _ = esm_fast.load(fair_checkpoint, device="cpu")
    chain = "MKTAYIAKQRQISFVKSHFSRQXW"
    ((_, contacts),) = _contacts(model, chain)
    head = model.contact_head.regression
    logits = features(model, chain) @ head.weight[0].detach().numpy() + head.bias.item()
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), contacts, atol=1e-5)


def _contacts(model, sequence):
    converted = model.alphabet.get_batch_converter()([("", sequence)])[2]
    with torch.no_grad():
        yield sequence, model.predict_contacts(converted)[0].numpy()


def test_the_fit_finds_the_maps_that_tell():
    choose = np.random.default_rng(0)
    x = choose.normal(size=(4000, 12)).astype("float32")
    y = choose.random(4000) < 1 / (1 + np.exp(-(3 * x[:, 2] - 2 * x[:, 7] - 2)))
    weight, bias = _logistic(x, y, 0.15)
    assert set(np.argsort(-np.abs(weight))[:2]) == {2, 7} and weight[2] > 2 > -1 > weight[7] and bias < -1


def test_a_chain_has_its_sequence_and_its_distances(tmp_path):
    """Three residues as they are written, one not seen, against distances by hand; a glycine gets its ideal C-beta."""
    lines = ["SEQRES   1 A    4  ALA MSE GLY SER"]
    atoms = [
        ("ALA", 1, {"N": (0, 0, 0), "CA": (1.46, 0, 0), "C": (2, 1.4, 0), "CB": (2, -0.8, 1.2)}),
        ("GLY", 3, {"N": (4, 4, 0), "CA": (5.46, 4, 0), "C": (6, 5.4, 0)}),
        ("SER", 4, {"N": (20, 0, 0), "CA": (21.46, 0, 0), "C": (22, 1.4, 0), "CB": (22, -0.8, 1.2)}),
    ]
    serial = 0
    for name, number, places in atoms:
        for atom, (x, y, z) in places.items():
            serial += 1
            place = f"{x:8.3f}{y:8.3f}{z:8.3f}"
            lines.append(f"ATOM  {serial:5d}  {atom:<3} {name} A{number:4d}    {place}  1.00 10.00           {atom[0]}")
    (tmp_path / "a.pdb").write_text("\n".join([*lines, "TER", "END"]) + "\n")
    (chain,) = read_structures(tmp_path / "a.pdb", least=1)
    assert (chain.name, chain.sequence) == ("a:A", "AMGS")
    assert chain.seen.tolist() == [True, False, True, True]
    np.testing.assert_allclose(chain.beta[0], (2, -0.8, 1.2))
    assert np.linalg.norm(chain.beta[2] - (5.46, 4, 0)) == pytest.approx(1.53, abs=0.03)
    assert chain.contacts[0].tolist() == [True, False, True, False] and np.isnan(chain.truth[1]).all()


@pytest.mark.parametrize("form", ["SEQRES", "mmCIF", "numbers alone"])
def test_residues_that_were_not_seen_keep_their_places(form, tmp_path):
    import gemmi

    (whole,) = read_structures(STRUCTURES[1])
    structure = gemmi.read_structure(str(STRUCTURES[1]))
    structure.setup_entities()
    if form != "numbers alone":
        structure.entities[0].full_sequence = [residue.name for residue in structure[0][0]]
        structure.assign_label_seq_id()
    for at in reversed(range(20, 26)):
        del structure[0][0][at]
    path = tmp_path / ("gap.cif" if form == "mmCIF" else "gap.pdb")
    structure.make_mmcif_document().write_file(str(path)) if form == "mmCIF" else structure.write_pdb(str(path))
    (chain,) = read_structures(path)
    missing = np.arange(len(whole.sequence))
    missing = (missing >= 20) & (missing < 26)
    known = whole.sequence if form != "numbers alone" else whole.sequence[:20] + 6 * "X" + whole.sequence[26:]
    assert chain.sequence == known and (chain.seen == ~missing).all()
    either = missing[:, None] | missing[None]
    assert ((chain.truth == whole.truth) | either).all() and np.isnan(chain.truth[either]).all()


def test_precision_counts_the_most_probable():
    """30 residues on a line, all of one place: the true ones are those of even distance."""
    chain = Structure("x", "A" * 30, np.zeros((30, 3)))
    distance = np.abs(np.subtract.outer(np.arange(30), np.arange(30)))
    chain.beta[:, 0] = 100 * (np.arange(30) % 2)  # odd ones far from even ones
    perfect = precisions((distance % 2 == 0).astype(float), chain)
    assert all(found["L/5"] == 1 for found in perfect.values())
    assert precisions((distance % 2).astype(float), chain)["medium"]["L/5"] == 0
    far = distance[np.triu_indices(30, 24)]
    assert perfect["long"]["any"] == pytest.approx((far % 2 == 0).mean())
    chain.beta[3] = np.nan
    assert precisions(np.eye(30), chain)["long"]["any"] != perfect["long"]["any"]


def test_a_fitted_regression_serves_the_model_it_was_fitted_to_and_no_other(fair_model, tmp_path, capsys):
    bare = save_fair_esm(fair_model, tmp_path / "bare.pt", regression=False)
    side = tmp_path / "bare-contact-regression.safetensors"
    fit = ["fit-contacts", str(bare), *map(str, STRUCTURES[:4]), "--pairs", "4000", "--c", "10", "--json"]
    assert main([*fit, "-o", str(side)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chains"] == 4 and found["held_out"] == 1 and set(found["precision"]) == {"short", "medium", "long"}
    own = weights.read(bare).tensors  # found beside the model
    stored = load_file(side)
    assert all(torch.equal(own[name], stored[name]) for name in NAMES)
    chain = read_structures(STRUCTURES[0])[0]
    (tmp_path / "p.fasta").write_text(f">p\n{chain.sequence}\n")
    asked = ["contacts", str(tmp_path / "p.fasta"), "--structure", str(STRUCTURES[0]), "--png", "-o"]
    assert main([*asked, str(tmp_path / "maps"), "--model", str(bare)]) == 0
    said = capsys.readouterr().out
    assert "worth     of the L most probable" in said and f"p, {chain.name}:" in said
    assert (tmp_path / "maps" / "p.png").stat().st_size > 10_000
    model, _ = esm_fast.load(bare, device="cpu")
    assert torch.equal(model.contact_head.regression.weight, stored[NAMES[0]])
    assert main([*asked, str(tmp_path / "other"), "--regression", str(side)]) == 1
    assert "was fitted to another model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def fitted(fair_model, tmp_path_factory):
    """A model without a regression, and one that was fitted to it, as tensors by their names."""
    folder = tmp_path_factory.mktemp("fitted")
    bare, side = save_fair_esm(fair_model, folder / "bare.pt", regression=False), folder / "r.safetensors"
    assert main(["fit-contacts", str(bare), *FIT, "-o", str(side)]) == 0
    return bare, side


@pytest.mark.parametrize("place", ["safetensors", "prepacked", "prepacked int8", "Hugging Face", ".pt"])
def test_a_regression_is_found_wherever_the_model_lies(fitted, place, tmp_path, capsys):
    bare, side = fitted
    converted, more = tmp_path / "m.v1.safetensors", []
    if place == "Hugging Face":
        converted = tmp_path / "folder"
        theirs = hf_model()  # a model of its own, and so is its regression
        torch.nn.init.zeros_(theirs.esm.contact_head.regression.weight)
        theirs.save_pretrained(converted)
        side = tmp_path / "hf.safetensors"
        assert main(["fit-contacts", str(converted), *FIT, "-o", str(side)]) == 0
    elif place == ".pt":
        shutil.copy(bare, converted := tmp_path / "m.pt")
    else:
        more = {"safetensors": [], "prepacked": ["--pack"]}.get(place, ["--pack", "--dtype", "int8"])
        assert main(["convert", str(bare), str(converted), *more]) == 0
    with pytest.raises(ValueError, match="no contact regression"):
        esm_fast.load(converted, device="cpu")[0].contact_head.require_fitted()
    name = "contact-regression" if converted.is_dir() else f"{converted.stem}-contact-regression"
    beside = (converted if converted.is_dir() else tmp_path) / f"{name}.safetensors"
    shutil.copy(side, beside)
    _serves(converted, side, tmp_path, capsys)
    beside.unlink()
    _serves(converted, side, tmp_path, capsys, "--regression", str(side))
    if more == []:  # what is converted with its regression beside it keeps it
        shutil.copy(side, beside)
        assert main(["convert", str(converted), str(tmp_path / "again.safetensors")]) == 0
        assert torch.equal(load_file(tmp_path / "again.safetensors")[NAMES[0]], load_file(side)[NAMES[0]])


def _serves(model, side, folder, capsys, *options):
    (folder / "p.fasta").write_text(">p\nMKTAYIAKQRQISFVKSHFSRQ\n")
    out = folder / "o.npz"
    asked = ["contacts", str(folder / "p.fasta"), "-o", str(out), "--force", "--model", str(model), *options]
    dtype = weights.prepacked_dtype(model)
    assert main([*asked, "--device", "cpu", *(["--dtype", dtype] if dtype else [])]) == 0
    assert "chains it was not fitted to" in capsys.readouterr().out
    loaded, _ = esm_fast.load(model, device="cpu", regression=options[1] if options else None)
    assert torch.equal(loaded.contact_head.regression.weight.float(), load_file(side)[NAMES[0]].to(
        loaded.contact_head.regression.weight.dtype).float())  # fmt: skip
    ((_, contacts),) = _contacts(loaded.float() if not dtype else loaded, "MKTAYIAKQRQISFVKSHFSRQ")
    np.testing.assert_allclose(np.load(out)["p"], contacts, atol=1e-5 if not dtype else 1e-2)


def test_what_is_no_regression_is_refused(fair_checkpoint, tmp_path):
    model = tmp_path / "m.pt"
    shutil.copy(fair_checkpoint, model)
    side = tmp_path / "m-contact-regression.safetensors"
    save_file({"a": torch.ones(2)}, side)
    with pytest.raises(weights.CheckpointError, match="is no contact regression"):
        weights.read(model)


def test_what_is_no_structure_is_one_line(tmp_path, capsys):
    (tmp_path / "a.pdb").write_text("hello\n")
    with gzip.open(tmp_path / "b.cif.gz", "wt") as file:
        file.write("data_x\n_a 'unfinished\n")
    (tmp_path / "no").mkdir()
    for name in ("a.pdb", "b.cif.gz", "none.pdb", ".", "no"):
        path = str(tmp_path / name if name != "." else tmp_path)
        assert main(["fit-contacts", "esm1b_t6_demo", path, "-o", str(tmp_path / "o.safetensors")]) == 1
        assert capsys.readouterr().err.count("error:") == 1
    assert not (tmp_path / "o.safetensors").exists()


def test_a_regression_of_nothing_is_refused(tmp_path, capsys):
    """Its file would be one that every reader takes for none."""
    fit = ["fit-contacts", "esm1b_t6_demo", *FIT[:4], "--pairs", "2000", "--c", "1e-6"]
    assert main([*fit, "-o", str(tmp_path / "r.safetensors")]) == 1
    assert "every coefficient is 0" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_files_without_a_protein_are_left_out_by_name(fair_checkpoint, tmp_path, capsys):
    folder = tmp_path / "structures"
    folder.mkdir()
    for path in STRUCTURES[:4]:
        shutil.copy(path, folder)
    water = "HETATM    1  O   HOH A   1       0.000   0.000   0.000  1.00 10.00           O\nEND\n"
    (folder / "0_water.pdb").write_text(water)
    fit = ["fit-contacts", str(fair_checkpoint), str(folder), "--pairs", "500", "--c", "10", "--json"]
    assert main([*fit, "-o", str(tmp_path / "r.safetensors")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["chains"] == 4 and "1 left out, no protein of 20 residues: 0_water.pdb" in err
    for path in STRUCTURES[:4]:
        (folder / path.name).unlink()
    assert main([*fit, "-o", str(tmp_path / "s.safetensors")]) == 1
    assert "no chain is left: 1 no protein of 20 residues" in capsys.readouterr().err


def test_the_shipped_model_says_what_its_contacts_are_worth(tmp_path, capsys):
    (tmp_path / "p.fasta").write_text(">p\nMKTAYIAKQRQISFVKSHFSRQ\n")
    assert main(["contacts", str(tmp_path / "p.fasta"), "-o", str(tmp_path / "o.npz")]) == 0
    assert "chains it was not fitted to" in capsys.readouterr().out
    assert np.load(tmp_path / "o.npz")["p"].shape == (22, 22)
