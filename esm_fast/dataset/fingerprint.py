"""What decides the bytes of a data set, field by field."""

import torch

from .. import _C, __version__, hub
from ..files.checksums import digest_of, sha256
from .layout import FORMAT, pa

_WEIGHTS = ("config.json", "model.safetensors", "pytorch_model.bin")


def of_model(name: str) -> str:
    """Of the checkpoint's bytes; random weights are what their name says."""
    if name.startswith("random:"):
        return name
    path = hub.resolve(name)
    if path.is_dir():
        return digest_of({part: sha256(path / part) for part in _WEIGHTS if (path / part).exists()})
    return sha256(path)


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
