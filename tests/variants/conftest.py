"""Models of both architectures: fair-esm's, and ours from its file."""

import random

import pytest
from fakes import fair_esm_model, save_fair_esm

import esm_fast


@pytest.fixture(scope="session", params=["esm1b", "esm1v"])
def pair(request, tmp_path_factory):
    """(fair-esm's model, ours), the same random weights."""
    fair = fair_esm_model(seed=7, norm_before=request.param == "esm1b")
    path = save_fair_esm(
        fair,
        tmp_path_factory.mktemp(request.param) / "tiny.pt",
    )
    return fair, esm_fast.load(path)[0]


@pytest.fixture(scope="session")
def ours(fair_checkpoint):
    return esm_fast.load(fair_checkpoint)[0]


@pytest.fixture(scope="session")
def protein():
    """Makes a random protein of a length, the same each time."""

    def make(length: int, seed: int = 0) -> str:
        return "".join(random.Random(seed).choices("ACDEFGHIKLMNPQRSTVWY", k=length))

    return make
