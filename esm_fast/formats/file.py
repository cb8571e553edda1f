"""Files of prepacked weights: safetensors whose panels the CPU kernels read where they lie, in the mapped file.

A prepacked matrix is stored as its bytes (U8) under its name and ".packed", all other tensors as usual. The matrices
come first and the data begin at a page, so every panel is aligned; for that the header is padded with spaces, as the
format allows. Any reader of safetensors opens the file; which processes map it share its pages.
"""

import json
from pathlib import Path

import numpy as np
import torch

from .. import _C
from . import formats
from .weight import MATRICES, PrepackedWeight

SUFFIX = ".packed"
_PAGE = 4096
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a model's tensors, of which some are PrepackedWeights."""
    packed = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, PrepackedWeight)}
    entries = [(key + SUFFIX, "U8", [tensor.weights.nbytes], tensor) for key, tensor in packed.items()]
    entries += [(key, _NAMES[t.dtype], list(t.shape), t) for key, t in tensors.items() if key not in packed]
    header, offset = {"__metadata__": metadata}, 0
    for key, dtype, shape, tensor in entries:
        end = offset + len(content(tensor))
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for *_, tensor in entries:
            file.write(content(tensor))


def content(tensor: torch.Tensor) -> memoryview:
    """The bytes a tensor is stored as, without a copy of a contiguous one on the CPU."""
    if isinstance(tensor, PrepackedWeight):
        return memoryview(tensor.weights)
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def address(view: memoryview) -> int:
    """Where the bytes of a tensor's `content` lie."""
    return np.frombuffer(view, np.uint8).ctypes.data


def view(stored: dict[str, torch.Tensor], config, kind: str) -> dict[str, torch.Tensor]:
    """What was stored -> a model's tensors: the panels as PrepackedWeights on the same memory.

    Args:
        kind: the name of the panels' format.

    Raises:
        ValueError: naming the tensor that cannot be what it should, or the format that nobody knows.
    """
    if kind not in formats():
        raise ValueError(f"its weights are one of {', '.join(formats())} for this version of esm_fast, not {kind}")
    width, hidden = config.embed_dim, config.ffn_embed_dim
    shapes = dict.fromkeys(MATRICES, (width, width)) | {"fc1": (hidden, width), "fc2": (width, hidden)}
    weight_class = formats()[kind].weight
    tensors = {}
    for name, tensor in stored.items():
        key = name.removesuffix(SUFFIX)
        if key != name:
            matrix = key.removesuffix(".weight").split(".", 2)[-1]  # layers.7.fc1.weight -> fc1
            if matrix not in shapes or tensor.dtype != torch.uint8:
                raise ValueError(f"{name} cannot be a prepacked matrix")
            try:
                tensor = weight_class(_C.view_weights(tensor.numpy(), kind, *shapes[matrix]))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{name}: {error}") from None
        tensors[key] = tensor
    return tensors
