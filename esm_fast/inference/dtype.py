"""The type to compute in where nobody named one: the fastest whose error is known."""

import torch

from .. import _C, hub, weights

_NATIVE_BF16 = ("avx512bf16", "amx")  # levels of esm_fast._C


def fastest(model: str, device: str) -> tuple[str, str]:
    """The type, and why it is that one."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    # Nothing published is prepacked, and only the header of another file is read.
    own = model.startswith("random:") or hub.is_published(model)
    if not own and (prepacked := weights.prepacked_dtype(hub.resolve(model))):
        return prepacked, "that of the packed file"
    if on_gpu:
        return "float32", "this is a GPU, where bfloat16 is not proven"
    if _C.isa() in _NATIVE_BF16:
        return "bfloat16", f"the kernels' level {_C.isa()} multiplies it natively"
    return "float32", f"the kernels' level {_C.isa()} does not multiply bfloat16 natively"
