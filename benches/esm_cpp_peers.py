"""esm-cpp, an engine of ESM-2 for CPUs, in an environment and a process of its own: it needs a numpy before 2.

    python -m venv E && E/bin/pip install esm-cpp==0.2.1 'numpy<2'
    python benches/bench_peers.py --model esm2_t6_8M_UR50D --esm-cpp E/bin/python

It packs and schedules proteins by itself, and gives logits, so that it runs the head too: 1 part in 13 of one layer.
What is timed is one call for all proteins, from their letters to means over their residues, and no start.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Run, Setup

WORKER = Path(__file__).with_name("esm_cpp_worker.py")
INSTALL = "python -m venv E && E/bin/pip install esm-cpp==0.2.1 'numpy<2', and --esm-cpp E/bin/python"


def esm_cpp_missing(setup: Setup) -> str:
    if setup.size.family != "esm2":
        return "it reads ESM-2 only"
    if setup.esm_cpp is None:
        return INSTALL
    asked = subprocess.run([setup.esm_cpp, "-c", "import esm_cpp"], capture_output=True, text=True)
    return asked.stderr.strip().rpartition("\n")[2] if asked.returncode else ""


def esm_cpp(precision: str) -> Callable[[Setup], Run]:
    """precision: "fp32", or "int8": weights by channel and activations, after SmoothQuant on the calibration."""

    def build(setup):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.safetensors")
            write(setup, path)
            worker = Worker(setup.esm_cpp)
            calibration = [residues for _, residues in setup.calibration] if precision == "int8" else []
            worker.ask({"weights": str(path), "calibration": calibration})
        return lambda job: np.array(worker.ask([residues for _, residues in job.proteins]), dtype=np.float32)

    return build


class Worker:
    """The process, which answers each line of JSON with one. It ends with this one: its input does."""

    def __init__(self, python: Path):
        threads = {"ESM_NUM_THREADS": str(torch.get_num_threads())}
        self.process = subprocess.Popen(
            [python, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | threads
        )

    def ask(self, question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"esm-cpp's process ended with status {self.process.wait()}")
        return json.loads(answer)


def write(setup: Setup, path: Path) -> None:
    """The shared weights as Hugging Face stores ESM-2: frequencies in each layer, as before transformers 5."""
    from safetensors.torch import save_file
    from torch_peers import hf_name

    tensors = {}
    for name, tensor in setup.state.items():
        if name.endswith("inv_freq"):
            layer = name.split(".")[1]
            tensors[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = tensor.clone()
        elif name.startswith("lm_head."):
            tensors[name.replace("lm_head.weight", "lm_head.decoder.weight")] = tensor.clone()
        elif name.startswith("contact_head."):
            tensors[f"esm.{name}"] = tensor
        else:
            tensors[f"esm.{hf_name(name)}"] = tensor
    save_file(tensors, path, {"format": "pt"})
