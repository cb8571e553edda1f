"""A family is one file, found by its name: nothing else in the package knows it."""

import ast
import dataclasses
import importlib
import json
import pickle
import pickletools
import re
from pathlib import Path

import pytest
import torch

import esm_fast
from esm_fast.models.family import aliases, canonical_name, config_class, families, of_config, of_name, published
from esm_fast.models.padded import classes

PACKAGE = Path(esm_fast.__file__).parent
# The names that users import, fair-esm's ProteinBertModel among them. Nothing else may know a family but its own file;
# texts that users read (docstrings, help, examples) may name models.
EXPORTS = PACKAGE / "__init__.py"


def files():
    own = {PACKAGE / "models" / f"{name}.py" for name in families()}
    return [path for path in PACKAGE.rglob("*.py") if path not in own and path != EXPORTS]


def names_in_code(path: Path):
    """Identifiers, attributes, imported modules and strings of a file, without docstrings and texts with spaces."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.alias(name=name, asname=other):
                yield node.lineno, f"{name} {other or ''}"
            case ast.ImportFrom(module=str(module)):
                yield node.lineno, module
            case ast.Constant(value=str(text)) if " " not in text.strip():
                yield node.lineno, text


def own_names():
    for name, family in families().items():
        yield name
        yield family.model.__name__
        yield from family.fair_esm_class.split(":")
        yield from {published.split("_")[0] for published in family.published}


def test_no_other_file_names_a_family():
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(set(own_names()))))})(?![a-z0-9])", re.IGNORECASE)
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in files()
        for line, name in names_in_code(path)
        if pattern.search(name) and "demo" not in name
    ]
    assert not found, "\n".join(found)
    for name in families():  # or the search would find nothing anywhere
        assert any(pattern.search(found) for _, found in names_in_code(PACKAGE / "models" / f"{name}.py"))


def test_families_are_found_by_their_files():
    assert {"esm1"} <= set(families())
    for name in families():
        assert (PACKAGE / "models" / f"{name}.py").is_file()
    names = [name for family in families().values() for name in family.published]
    assert len(names) == len(set(names)) and not set(names) & set(aliases())
    assert set(aliases().values()) <= set(names)


@pytest.mark.parametrize("name", list(published()))
def test_a_published_model_knows_its_family_and_files(name):
    family, config = of_name(name), published()[name]
    assert of_config(config) is family and type(config) is family.config
    urls = family.downloads(name)
    assert urls[-1][1] == f"{name}.pt" and all(url.endswith(f"/{file}") for url, file in urls)
    assert canonical_name(f"facebook/{name}") == name
    assert all(canonical_name(alias) == of for alias, of in family.aliases.items())


@pytest.mark.parametrize("name", list(published()))
def test_configurations_come_back_from_json_and_from_transformers(name):
    family, config = of_name(name), published()[name]
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_class(stored)(**stored) == config
    fields = {"model_type": "esm"} | family.hf_config(config)
    assert [f for f in families().values() if f.reads_hf(fields)] == [family]
    assert family.config_from_hf(fields) == config


def test_a_family_of_a_later_version_is_refused_by_name():
    with pytest.raises(ValueError, match="its family is 'esm9'; this version of esm_fast has esm1"):
        config_class({"family": "esm9", "layers": 1})


@pytest.mark.parametrize("kind", classes().values(), ids=classes())
def test_a_whole_model_in_a_file_of_pickle_loads(kind, tmp_path):
    """torch.save(model), which users do: the file names the class by the path that this version and older ones have."""
    config = next(f.config for f in families().values() if issubclass(kind, f.model))
    torch.manual_seed(0)
    model = kind(config(layers=2, embed_dim=16, attention_heads=2, ffn_embed_dim=32)).eval()
    named = [text for _, text, _ in pickletools.genops(pickle.dumps(model, protocol=2)) if isinstance(text, str)]
    assert f"esm_fast.compat.fair_esm {kind.__name__}" in named
    assert getattr(importlib.import_module("esm_fast.compat.fair_esm"), kind.__name__) is kind
    torch.save(model, tmp_path / "whole.pt")
    tokens = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1]])
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert type(twin) is kind and not twin.training
        with torch.no_grad():
            assert torch.equal(twin(tokens)["logits"], model(tokens)["logits"])
