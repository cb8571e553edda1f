"""The Hugging Face model converted by OpenVINO: bf16, and int8 by NNCF's post-training quantisation."""

from collections.abc import Callable

import numpy as np
import torch
from common import Run, Setup, in_padded_batches, mean_of_residues
from torch_peers import hf_parts


def openvino(precision: str) -> Callable[[Setup], Run]:
    """precision: "bf16", or "int8", whose other operations are in bf16 too."""

    def build(setup):
        import openvino

        model, tokenizer = hf_parts(setup.size, setup.state, torch.float32)
        graph = convert(model, tokenizer)
        del model
        if precision == "int8":
            graph = quantized(graph, tokenizer, setup)
        # LATENCY: all threads work on one batch
        hints = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.Core().compile_model(graph, "CPU", hints | threads)

        def embed(proteins):
            hidden = compiled(tokens_of(tokenizer, proteins))[0]
            return mean_of_residues(torch.from_numpy(hidden), proteins)

        return in_padded_batches(setup, embed)

    return build


def convert(model, tokenizer):
    """The encoder as an OpenVINO graph of any batch and length, with one output."""
    import openvino

    class LastHidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    # two rows of unequal length: with a mask of ones transformers would leave the mask out of the traced graph
    example = dict(tokenizer(["MKTAYIAKQR", "MKTAY"], padding=True, return_tensors="pt"))
    with torch.inference_mode():
        return openvino.convert_model(
            LastHidden(), example_input=example, input=[("input_ids", [-1, -1]), ("attention_mask", [-1, -1])]
        )


def quantized(graph, tokenizer, setup: Setup):
    """NNCF's transformer preset: SmoothQuant, int8 weights per channel, int8 activations with calibrated ranges."""
    import nncf

    batches = [tokens_of(tokenizer, [protein]) for protein in setup.calibration]
    return nncf.quantize(graph, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))


def tokens_of(tokenizer, proteins) -> dict[str, np.ndarray]:
    inputs = tokenizer([residues for _, residues in proteins], padding=True, return_tensors="np")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}
