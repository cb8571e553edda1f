"""Fixtures shared by the tests; the models behind them are made in `fakes`.

Tests of the CPU stay on the CPU: a GPU is seen by `pytest -m gpu` alone. A file whose optional package is missing is
left out with a word, and the others are collected.
"""

import os
import platform
import re
import shutil

# Torch's threads sleep while they wait: spinning, those of tests that run side by side take the cores from each other,
# and four fifths of the suite's time. Set before torch is imported; commands that tests run inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# NumPy's and SciPy's cannot be told to: on small matrices they spin for longer than they compute.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from fakes import fair_esm_model, save_fair_esm
from forks import Forks

# Of the extras, imported by test files at their head.
OPTIONAL = ("hypothesis", "mavehgvs", "ml_dtypes", "pyarrow", "ray", "submitit", "zstandard")


def pytest_configure(config):
    if "gpu" not in (config.option.markexpr or ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # in the commands that tests run, too


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "callspec", None) and str(item.callspec.params.get("device")).startswith("cuda"):
            item.add_marker("gpu")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    said = str(report.longrepr) if report.failed else ""
    missing = re.findall(r"No module named '(\w+)|needs (\w+): pip install", said)
    if missing and (name := "".join(missing[-1])) in OPTIONAL:
        report.outcome, report.result = "skipped", []
        report.longrepr = (str(collector.path), 0, f"{name} is not installed")
    return report


@pytest.fixture(autouse=True, scope="session")
def remembered(tmp_path_factory):
    """What is remembered of files stays out of the user's cache, here and in the commands that tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESM_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def fair_model():
    """A random `esm.ProteinBertModel`, three layers of 4 heads x 8."""
    return fair_esm_model(seed=1)


@pytest.fixture(scope="session")
def fair_checkpoint(fair_model, tmp_path_factory):
    """Its file, with the contact regression beside it, as fair-esm publishes them."""
    return save_fair_esm(fair_model, tmp_path_factory.mktemp("fair") / "tiny.pt")


@pytest.fixture(scope="module")
def forks():
    """Runs the command line in processes of their own."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    with Forks() as forks:
        yield forks


@pytest.fixture
def one_thread():
    """Torch's threads are one, and as many as before when the test is over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cuda_library():
    """The CUDA kernels, built for the emulator."""
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("the emulator needs g++ on x86-64")
    from cuda_emulator.emulator import loadable, shipped

    return loadable(shipped())


@pytest.fixture
def emulated(cuda_library):
    """Has the CUDA backend executed by the emulator, on CPU tensors, in a shuffled order of blocks and threads.

    Fresh memory is NaN, so that an element that no thread writes is seen.
    """
    from cuda_emulator.emulator import Emulator
    from esm_fast.kernels.cuda.common import executed_by

    torch.use_deterministic_algorithms(True)
    with executed_by(Emulator(cuda_library, seed=1)) as emulator:
        yield emulator
    torch.use_deterministic_algorithms(False)
