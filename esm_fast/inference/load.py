"""Loading a model by name or path, or with random weights."""

import warnings
from functools import cache
from pathlib import Path

import torch

from .. import hub, weights
from ..edits import lies_in_a_file
from ..formats import formats, of_dtype
from ..formats.format import Format
from ..formats.model import Prepacking
from ..memory import MappedFiles, without_values
from ..models.encoder import Encoder
from ..models.family import published
from ..models.padded import api_class
from ..ops import verdicts
from ..ops.registry import request_of, require_backend

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {name: form.dtype for name, form in formats().items()}  # of the layers' matrices


def load(name_or_path, *, device="auto", dtype="auto", backend=None, packed=None, regression=None):
    """Loads a model, as `esm.pretrained` does, and returns (model, alphabet).

    Args:
        name_or_path: a published name (esm1b_t33_650M_UR50S, facebook/esm-1b, esm1v_t33_650M_UR90S_1 ... 5), found in
            the torch-hub or Hugging Face cache or downloaded; a fair-esm .pt file; a Hugging Face folder; a file
            written by `esm-fast convert`; or random:NAME[:seed], that architecture with seeded random weights. Also a
            `weights.Checkpoint` that was read.
        device: "auto" (a GPU if there is one and the weights are not packed), or anything torch.device takes.
        dtype: "auto" (float32, the reference's numbers; that of a prepacked file), "float32", "bfloat16", "float16",
            "float64" or a torch.dtype. "int8": the layers' matrices in 8 bits, bfloat16 around them; for inference on
            CPUs, and less exact (docs/cpu.md says by how much).
        backend: name of a backend that must run every op it implements; None takes the best that can run.
        packed: whether the layers' matrices are held packed for the CPU kernels: half the memory, and for inference
            only. None: if the file is packed (`esm-fast convert --pack`), which is then mapped and used as it lies;
            True: yes; "auto": where the CPU kernels are going to run; False: no, all parameters are ordinary tensors.
        regression: a file of `esm-fast fit-contacts`, or fair-esm's, to predict contacts with; None: the model's own,
            or NAME-contact-regression.safetensors or .pt beside it.

    Raises:
        FileNotFoundError, weights.CheckpointError, ops.BackendError; ValueError, also with the reason why packed
        weights could not be used here.
    """
    require_backend(backend)
    if packed not in (None, True, False, "auto"):
        raise ValueError(f"packed is {packed!r}; choose one of None, True, False, 'auto'")
    checkpoint = name_or_path if isinstance(name_or_path, weights.Checkpoint) else None
    wanted, name = _dtype(dtype), str(checkpoint.source if checkpoint else name_or_path)
    form = _quantised(wanted)
    if form is not None:
        form.require(device, backend, packed)
    if checkpoint is None and not name.startswith("random:"):
        checkpoint = weights.read(hub.resolve(name_or_path))
    if regression is not None:
        if checkpoint is None:
            raise ValueError(f"{name} has random weights: no contact regression was fitted to them")
        checkpoint = weights.attach(checkpoint, Path(regression))
    if checkpoint is not None and packed is False:
        checkpoint = checkpoint.unpacked()
    elif checkpoint is not None and checkpoint.packed:
        packed = True
        _require_own_dtype(checkpoint, wanted)
        wanted = checkpoint.dtype
        form = _quantised(wanted)
    device = _device(device, packed is True or form is not None)
    prepack = None
    if form is not None or packed is True or (packed == "auto" and device.type == "cpu"):
        prepack = Prepacking(form, insist=packed is True, forget=MappedFiles().forget)
    if checkpoint is None:
        model = random_model(name, backend=backend).to(_around(wanted))
        for layer in model.layers if prepack else ():
            prepack(model, layer)
    else:
        model_class, dtype = api_class(checkpoint.config), _around(wanted)
        model = weights.build(checkpoint, model_class, dtype=dtype, backend=backend, prepack=prepack)
    if device.type == "cpu" and (prepack is None or prepack.form is None):
        lies_in_a_file(model)
    _say_unqualified(device)
    return model.eval().to(device), model.alphabet


@cache
def _say_unqualified(device: torch.device) -> None:
    """Once a process, where faster kernels may be there than those that run unproven."""
    if device.type == "cuda" and verdicts.folder() and not verdicts.table(request_of(device, dtype=torch.float32)):
        warnings.warn("kernels were not tried on this GPU: esm-fast qualify proves and times them", stacklevel=3)


def _device(device, packed: bool) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not packed else "cpu"
    if packed and torch.device(device).type != "cpu":
        raise ValueError(f"prepacked weights are for the CPU kernels, not for {device}; load with packed=False")
    return torch.device(device)


def _around(wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of ordinary tensors."""
    form = _quantised(wanted)
    return (wanted or torch.float32) if form is None else form.around


def _quantised(wanted: torch.dtype | None) -> Format | None:
    """The format of a dtype that no ordinary tensors have."""
    form = of_dtype(wanted)
    return form if form is not None and form.quantised else None


def _require_own_dtype(checkpoint: weights.Checkpoint, wanted: torch.dtype | None) -> None:
    if wanted not in (None, checkpoint.dtype):
        own = str(checkpoint.dtype).removeprefix("torch.")
        raise ValueError(
            f"{checkpoint.source} holds {own} weights, prepacked; load it with dtype={own!r} or 'auto', or convert its "
            "original to the type you want"
        )


def random_model(name: str, *, backend=None) -> Encoder:
    """'random:NAME[:seed]' -> the full architecture with seeded random weights. Its numbers mean nothing."""
    _, architecture, *rest = name.split(":")
    architecture = hub.canonical_name(architecture)
    if architecture not in published() or len(rest) > 1 or not all(_is_seed(seed) for seed in rest):
        raise ValueError(f"{name!r}: expected random:NAME[:seed] with NAME one of {', '.join(published())}")
    generator = torch.Generator().manual_seed(int(rest[0]) if rest else 0)
    with without_values():
        config = published()[architecture]
        model = api_class(config)(config, backend=backend)
    model = model.to_empty(device="cpu")
    model.lm_head.weight = model.embed_tokens.weight  # to_empty gives each its own
    model.reset_buffers()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if "layer_norm" in key and key.endswith("weight") else 0.0)
        model.clear_padding()
    return model


def _is_seed(text: str) -> bool:
    return text.isdecimal() and len(text) < 20 and int(text) < 2**63


def _dtype(dtype) -> torch.dtype | None:
    """The dtype to convert to; None for "auto"."""
    if isinstance(dtype, str) and dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    try:
        return DTYPES[dtype]
    except (KeyError, TypeError):
        raise ValueError(f"dtype is {dtype!r}; choose one of auto, {', '.join(DTYPES)}") from None
