import pytest
from predictors import CONFIG

from esm_fast.train import metrics
from esm_fast.train.model import new_model


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(metrics, "_RESAMPLES", 20)


@pytest.fixture
def esm():
    """Small weights: the last layer still shows which residue stands where."""
    return new_model(CONFIG, seed=0, std=0.05)
