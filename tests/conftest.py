"""Fixtures shared by the tests; the models behind them are made in `fakes`."""

import pytest
from fakes import fair_esm_model, save_fair_esm


@pytest.fixture(scope="session")
def fair_model():
    """A random `esm.ProteinBertModel`, three layers of 4 heads x 8."""
    return fair_esm_model(seed=1)


@pytest.fixture(scope="session")
def fair_checkpoint(fair_model, tmp_path_factory):
    """Its file, with the contact regression beside it, as fair-esm publishes them."""
    return save_fair_esm(fair_model, tmp_path_factory.mktemp("fair") / "tiny.pt")
