"""What decides the bytes of a data set, field by field."""

import torch

from .. import _C, __version__, hub, weights
from ..files.checksums import digest_of
from .layout import FORMAT, pa


def of_model(name: str) -> str:
    """Of the checkpoint's bytes; random weights are what their name says."""
    if name.startswith("random:"):
        return name
    path = hub.resolve(name)
    files = weights.files_of(path)
    if files == [path]:
        return weights.sha256(path)
    return digest_of({file.name: weights.sha256(file) for file in files})


def of_versions(device: torch.device) -> dict[str, str]:
    """What else the numbers, and the files around them, depend on."""
    on_gpu = device.type == "cuda"
    return {
        "format": FORMAT,
        "hardware": torch.cuda.get_device_name(device) if on_gpu else f"cpu {_C.isa()}",
        "esm_fast": __version__,
        "torch": torch.__version__,
        "pyarrow": pa.__version__,
    }
