"""The drop-in's own tests, with fair-esm's face and Hugging Face's, on the Triton kernels."""

import dataclasses

import pytest
import test_fair_esm
import test_hf
import torch
from triton_proof import sanitizer

from esm_fast.ops import OPS, registry


@pytest.fixture(autouse=True)
def triton_unasked(monkeypatch):
    """The models under test name no backend: here they get the Triton kernels, which must have run."""
    for name in OPS:
        kernels = [dataclasses.replace(kernel, yields=registry.Kernel.yields) if kernel.backend == "triton" else kernel
                   for kernel in registry.kernels(name)]  # fmt: skip
        monkeypatch.setitem(registry._KERNELS, name, kernels)
    monkeypatch.setattr(OPS["transformer_stack"].__class__, "has_kernel", lambda *_: False)  # layer by layer
    registry.select.cache_clear()
    with sanitizer.recording() as launches:
        yield
    registry.select.cache_clear()
    assert {"attention_forward", "embed_rows"} <= {launch.kernel for launch in launches}


@pytest.mark.parametrize("norm_before, token_dropout, heads, head_dim", [(True, True, 3, 20), (False, False, 2, 64)])
def test_everything_equals_fair_esm(tmp_path, norm_before, token_dropout, heads, head_dim):
    test_fair_esm.test_everything_equals_fair_esm(tmp_path, norm_before, token_dropout, heads, head_dim)


@pytest.mark.parametrize(
    "test",
    [
        test_fair_esm.test_packed_equals_padded_equals_alone,
        test_fair_esm.test_gradients_equal_fair_esms,
        test_fair_esm.test_contact_gradients_equal_fair_esms,
        test_fair_esm.test_padding_in_the_middle_and_raw_tokens,
        test_fair_esm.test_all_padding_rows_are_zero_not_nan,
    ],
    ids=lambda test: test.__name__[5:],
)
def test_fair_esms_face(test, fair_model, tmp_path):
    test(fair_model, tmp_path)


def test_a_ragged_batch_equals_transformers():
    test_hf.test_ragged_batch_equals_transformers(True, True, torch.float32, 1e-4)
