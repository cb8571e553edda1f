"""The warp-specialised products with TMA: what is compiled of them, and launched. Their results: interpreted_tma.py."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from esm_fast.ops import BackendError, registry
from esm_fast.ops.gelu_ffn import _case

triton = pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
sys.path.append(str(Path(__file__).parents[2] / "benches"))

registry.backends()
import stub_driver  # noqa: E402
from esm_fast.kernels import tma  # noqa: E402
from triton_proof import audit  # noqa: E402


@pytest.mark.parametrize("arch", [90, 100])
def test_it_is_specialised_and_spills_nothing(arch):
    if triton.__version__ != audit.TRITON_VERSION:
        pytest.skip(f"is told of Triton {audit.TRITON_VERSION}")
    facts = audit.audit(tma.compile_specs(arch)[-1], arch)
    assert facts.problems() == [] and facts.registers == 168  # what a warp group is given, not all there are
    assert facts.blocks == 1


def test_descriptors_get_their_memory_and_nobody_else_an_allocator(monkeypatch, tmp_path):
    """Down to a driver that launches nothing."""
    if not shutil.which("gcc") or torch.cuda.is_available():
        pytest.skip("needs a C compiler, and no other driver in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    given = [*_case("some", 130, 64, 128).build(torch.bfloat16, "cpu", 0).values(), 1e-5]
    with stub_driver.stubbed(90), torch.inference_mode():
        before = stub_driver.launches()
        tma.ffn(*given)
        assert stub_driver.launches() - before == 3
    (kernels,) = [cache[0] for device, cache in tma.linear_tma.device_caches.items() if device == 90]
    assert all(kernel.metadata.global_scratch_size for kernel in kernels.values())
    from triton.runtime import _allocation

    with pytest.raises(RuntimeError, match="allocator"):
        _allocation._allocator.get()(1, 1, None)


@pytest.mark.parametrize(
    "change, reason",
    [({"arch": (8, 9)}, "is compiled for compute capability 9.0 and 10.0, this GPU has 8.9"),
     ({"dtype": torch.float32}, "has float16 and bfloat16"), ({"grad": True}, "no gradients of its own")],
)  # fmt: skip
def test_it_says_what_it_is_not_for(change, reason):
    request = registry.Request("cuda", (9, 0), torch.bfloat16, 64, False)
    assert tma.why_not(request) == [] and any(reason in why for why in tma.why_not(request._replace(**change)))
    with pytest.raises(BackendError, match="tma"):
        registry.select("gelu_ffn", request._replace(**change), "tma")
