"""Fixtures of the tests of the CPU kernels."""

import pytest
import torch
from cpu_levels import LEVELS

from esm_fast import _C


@pytest.fixture(params=LEVELS)
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
