"""The peers of the side-by-side runs, and ourselves."""

from collections.abc import Callable

import numpy as np
import torch
from common import Peer, Run, Setup, Size
from esm_cpp_peers import esm_cpp, esm_cpp_missing
from openvino_peers import openvino
from torch_peers import fair_esm, hugging_face, torch_packed


def our_model(size: Size, state: dict[str, torch.Tensor], dtype: str, backend: str | None = None):
    """Ours on the shared weights; without a named backend packed or quantised, as the command line loads it."""
    from esm_fast.formats import formats
    from esm_fast.formats.model import prepack_model, why_not
    from esm_fast.inference.load import DTYPES
    from esm_fast.models.family import families

    with torch.device("meta"):
        model = families()[size.family].model(size.config(), backend=backend)
    plain = DTYPES["bfloat16" if dtype == "int8" else dtype]
    fixed = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    model.load_state_dict({k: v if k in fixed else v.to(plain) for k, v in state.items()}, assign=True)
    if dtype == "int8":
        prepack_model(model, formats()["int8"])
    elif backend is None and why_not(model) is None:
        prepack_model(model)
    return model.eval()


def ours(dtype: str) -> Callable[[Setup], Run]:
    def build(setup):
        from esm_fast.inference.embed import embed

        model = our_model(setup.size, setup.state, dtype)

        def run(job):
            layer = setup.size.layers
            results = embed(model, job.fasta, layers=(layer,), batch_tokens=setup.batch_tokens)
            return np.stack([arrays[layer] for _, arrays in results])

        return run

    return build


def int8_missing(setup: Setup | None = None) -> str:
    from esm_fast.formats import formats

    try:
        formats()["int8"].require("cpu", None, None)
    except ValueError as error:
        return str(error)
    return ""


def only_esm1(setup: Setup) -> str:
    return "" if setup.size.family == "esm1" else "written for learned positions, which this model does not have"


OURS = "esm_fast-"  # how the names of our own begin
PEERS = (
    Peer("fair-esm-fp32", "fp32", ("esm",), fair_esm),
    Peer("hf-fp32", "fp32", ("transformers",), hugging_face(torch.float32)),
    Peer("esm-cpp-fp32", "fp32", (), esm_cpp("fp32"), why_not=esm_cpp_missing, output="logits"),
    Peer("esm_fast-fp32", "fp32", (), ours("float32")),
    Peer("hf-bf16", "bf16", ("transformers",), hugging_face(torch.bfloat16)),
    Peer("openvino-bf16", "bf16", ("transformers", "openvino"), openvino("bf16")),
    Peer("torch-bf16-packed", "bf16", (), torch_packed, why_not=only_esm1),
    Peer("esm_fast-bf16", "bf16", (), ours("bfloat16")),
    Peer("openvino-int8", "int8", ("transformers", "openvino", "nncf"), openvino("int8")),
    Peer("esm-cpp-int8", "int8", (), esm_cpp("int8"), why_not=esm_cpp_missing, output="logits"),
    Peer("esm_fast-int8", "int8", (), ours("int8"), why_not=int8_missing),
)
