"""The type to compute in where nobody named one, the one meaning of `--dtype auto`.

It is the fastest type whose error the docs state and that the machine multiplies by itself; where `esm-fast qualify`
measured it less than 5 % faster than float32, float32. `esm_fast.load` does not ask here: its "auto" is float32, the
reference's numbers.
"""

import torch

from .. import _C, hub, weights
from ..ops import verdicts
from ..ops.registry import request_of

AUTO = "auto"
WAY_BACK = "--dtype float32 gives the reference's numbers"
_NATIVE_BF16 = "avx512bf16"  # the level of esm_fast._C from which it is multiplied natively


def fastest(model: str, device: str, backend: str | None = None) -> tuple[str, str]:
    """The type, and why it is that one. backend: the one that is insisted on."""
    # Nothing published is prepacked, and only the header of another file is read.
    own = model.startswith("random:") or hub.is_published(model)
    if not own and (prepacked := weights.prepacked_dtype(hub.resolve(model))):
        return prepacked, "that of the prepacked file"
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        device = "cuda" if device == "auto" else device
        return as_measured(*of_gpu(torch.cuda.get_device_capability(device)), device)
    if backend not in (None, "cpu"):
        return "float32", f"backend {backend} is not the one that multiplies bfloat16 natively on a CPU"
    if _C.at_least(_NATIVE_BF16):
        return as_measured("bfloat16", f"the kernels' level {_C.isa()} multiplies it natively", "cpu")
    return "float32", f"the kernels' level {_C.isa()} does not multiply bfloat16 natively"


def of_gpu(arch: tuple[int, int]) -> tuple[str, str]:
    """By what a GPU's tensor cores take: fp16 from Volta on, bf16 from Ampere on."""
    name = "sm_{}{}".format(*arch)
    if arch >= (8, 0):
        return "bfloat16", f"{name} multiplies it natively"
    if arch >= (7, 0):
        return "float16", f"{name} multiplies it natively, and bfloat16 not"
    return "float32", f"{name} multiplies no half precision natively"


def as_measured(dtype: str, why: str, device: str) -> tuple[str, str]:
    """The same where nobody measured, or a layer was faster by it than in float32, on this very machine; else that."""
    request = request_of(torch.device(device), dtype=torch.float32)
    took = verdicts.layer_seconds(request, dtype, "float32") if dtype != "float32" else None
    if took is None:
        return dtype, why
    share = took[0] / took[1]
    if share > verdicts.MARGIN:
        return "float32", f"a layer was measured at {share:.2f} x its time in {dtype} here"
    return dtype, f"{why}, and a layer was measured at {share:.2f} x the time of float32 here"


def line(dtype: str, asked: str) -> str:
    """The summary's: the type, and the way back where it was chosen and is not the reference's."""
    chosen = asked == AUTO and dtype in ("bfloat16", "float16")
    return f"dtype     {dtype}" + (f" (chosen here; {WAY_BACK})" if chosen else "")
