"""The driver's calls, on a fake libcuda: what a launch does in a thread that has no context, and in a capture."""

import ctypes
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from esm_fast.kernels.cuda import driver
from esm_fast.kernels.cuda.launch import Launch

CONTEXT, OTHER = 0x1000, 0x2000


class FakeCuda:
    """Notes the calls; as the driver, it refuses a launch in a thread whose current context is not the device's."""

    def __init__(self):
        self.calls, self.current = [], {}

    def _thread(self):
        return threading.get_ident()

    def cuCtxGetCurrent(self, out):
        out._obj.value = self.current.get(self._thread())
        return 0

    def cuCtxSetCurrent(self, context):
        self.calls.append("set")
        self.current[self._thread()] = context.value
        return 0

    def cuDeviceGet(self, out, index):
        out._obj.value = index
        return 0

    def cuDevicePrimaryCtxRetain(self, out, device):
        self.calls.append("retain")
        out._obj.value = CONTEXT + device.value
        return 0

    def cuLibraryLoadData(self, *_):
        self.calls.append("load")
        return 0

    def cuLibraryGetKernel(self, *_):
        return 0

    def cuLaunchKernel(self, *_):
        self.calls.append("launch")
        return 0 if self.current.get(self._thread()) == CONTEXT else 201  # CUDA_ERROR_INVALID_CONTEXT

    def cuGetErrorString(self, code, out):
        out._obj.value = b"invalid device context"
        return 0


@pytest.fixture
def fake(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(driver, "_library", lambda: cuda)
    monkeypatch.setattr(driver, "image_name", lambda *_: "pool.f32.sm_90.cubin")
    monkeypatch.setattr(driver, "_load", lambda name, kernel: cuda.cuLibraryLoadData() or ctypes.c_void_p(1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    driver._context.cache_clear()
    yield cuda
    driver._context.cache_clear()


class OnGpu(torch.Tensor):
    """A tensor that says it lies on the first GPU."""

    device = torch.device("cuda", 0)


def launch(executor):
    x = torch.zeros(4).as_subclass(OnGpu)
    executor.launch(Launch("pool", "pool_forward", torch.float32, (1,), 32, (x, 4)))


@pytest.mark.parametrize("before", [None, OTHER])
def test_a_launch_binds_torchs_context_first(fake, before):
    """In a fresh thread, and in one where another device's is current; then it stays."""
    executor, failed = driver.Driver(), []

    def work():
        try:
            fake.current[fake._thread()] = before
            launch(executor)
            launch(executor)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and fake.calls == ["retain", "set", "load", "launch", "launch"]


def test_code_is_not_loaded_while_a_graph_is_captured(fake, monkeypatch):
    executor = driver.Driver()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(driver.DriverError, match="run the same once before"):
        launch(executor)
    assert "launch" not in fake.calls
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch(executor)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch(executor)  # it is loaded now
    assert fake.calls.count("launch") == 2


def test_triton_tells_what_a_capture_does_not_take(monkeypatch):
    common = pytest.importorskip("esm_fast.kernels.triton.common")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capturing, expected in ((True, "run the same once before the capture"), (False, "^refused$")):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        with pytest.raises(RuntimeError, match=expected), common.first_launches_told():
            raise RuntimeError("refused")


def test_triton_says_what_it_lacks_at_run_time(monkeypatch, tmp_path):
    common = pytest.importorskip("esm_fast.kernels.triton.common")
    from esm_fast.ops.registry import Request

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(common.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(common.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    scope = getattr(common.triton.knobs.cache, "scope", nullcontext)
    with scope():
        common.triton.knobs.cache.dir = "/proc/none/cache"
        common._not_here.cache_clear()
        said = " | ".join(common.why_not(Request("cuda", (9, 0), torch.bfloat16, None, False)))
        assert "needs a C compiler" in said and "Python.h" in said and "TRITON_CACHE_DIR" in said
        (tmp_path / "hash").mkdir()
        (tmp_path / "hash/cuda_utils.cpython-311.so").touch()
        common.triton.knobs.cache.dir = str(tmp_path)  # filled while a container was built, which has no compiler
        common._not_here.cache_clear()
        assert common.why_not(Request("cuda", (9, 0), torch.bfloat16, None, False)) == []
    common._not_here.cache_clear()
