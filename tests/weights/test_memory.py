"""Loading, converting and prepacking large models: a layer at a time, in little more memory than what is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from esm_fast.models.esm2 import Config
from esm_fast.models.family import families

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")

# As many layers as ESM-2's 3B has, 40 heads and 4 times the width as there; 15B has more, so that one weighs less.
LAYERS, WIDTH, HEADS = 36, 400, 40
# A layer so large that it, or a copy of its largest matrix, would show.
WIDE = (1, 1600, 20)
ALLOWED = 1.1  # of what is kept
# What does not grow with the layers' size, about 24 MB: code, what some rows take while they are quantised, and of the
# file 64 KB around each small tensor. All layers in bf16 before 8 bits would be four times as much more.
NOISE = 32 << 20
# Large blocks come from the system and go back to it. By itself glibc moves this bound up to the largest block freed,
# and the holes in its heap, another 10 to 30 MB, then depend on addresses.
MMAP_FROM = 1 << 18

# One process a case, forked after the imports: memory that was freed could be used again unnoticed.
MEASURE = """
import ctypes, gc, json, os, sys, warnings, torch, esm_fast, esm_fast.weights
from esm_fast.cli import main
from esm_fast.formats.weight import PrepackedWeight
import esm_fast.cli.convert
warnings.simplefilter("ignore")
torch.set_num_threads(1)
def status(field):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(field))) * 1024
def kept(model):
    parts = [*model.parameters(), *model.buffers()]
    return sum(p.weights.nbytes if isinstance(p, PrepackedWeight) else p.nbytes for p in parts)
def measure(case):
    # Code that runs for the first time is read from its files, which counts as this process's memory.
    options = case["load"] or {"dtype": "int8", "backend": "cpu"}
    for dtype in {options["dtype"], "int8"}:
        esm_fast.load(**options | {"name_or_path": small, "dtype": dtype})
    if case["command"]:
        main(["convert", small, case["command"][2] + ".small", *case["command"][3:]])
    gc.collect(); ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    if case["command"]:
        assert main(case["command"]) == 0
        size = os.path.getsize(case["command"][2])
    else:
        size = kept(esm_fast.load(**case["load"])[0])
    return size, status("VmHWM") - before
small, *cases = json.loads(sys.stdin.read())
for case in cases:
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(2, 1)
        os.write(write, json.dumps(measure(case)).encode())
        os._exit(0)
    os.close(write)
    print(os.read(read, 1000).decode())
    os.wait()
"""


def shard(generator, prefix: str, width: int, hidden: int) -> dict[str, torch.Tensor]:
    """A layer under Hugging Face's names."""
    shapes = {f"attention.self.{part}": (width, width) for part in ("query", "key", "value")}
    shapes |= {"attention.output.dense": (width, width), "intermediate.dense": (hidden, width)}
    shapes |= {"output.dense": (width, hidden), "attention.LayerNorm": (width,), "LayerNorm": (width,)}
    tensors = {}
    for name, shape in shapes.items():
        weight = torch.empty(shape).uniform_(-0.05, 0.05, generator=generator)
        tensors |= {f"{prefix}{name}.weight": weight, f"{prefix}{name}.bias": torch.zeros(shape[0])}
    return tensors


def write_sharded(folder: Path, layers: int, width: int, heads: int, shards: int = 3) -> Path:
    """An ESM-2 as transformers stores a large one, written a shard at a time."""
    folder.mkdir()
    generator, head_dim = torch.Generator().manual_seed(0), width // heads
    config = families()["esm2"].hf_config(Config(layers, width, 4 * width, heads))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "esm"}))
    vocabulary = torch.empty(33, width).uniform_(-1, 1, generator=generator)
    rest = {"esm.embeddings.word_embeddings.weight": vocabulary, "lm_head.decoder.weight": vocabulary.clone()}
    rest |= {"lm_head.bias": torch.zeros(33), "lm_head.dense.weight": torch.eye(width)}
    for name in ("esm.encoder.emb_layer_norm_after", "lm_head.layer_norm"):
        rest |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    rest |= {"lm_head.dense.bias": torch.zeros(width), "esm.contact_head.regression.bias": torch.zeros(1)}
    rest["esm.contact_head.regression.weight"] = torch.ones(1, layers * heads)
    rest["esm.rotary_embeddings.inv_freq"] = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    where = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors = rest if number == 0 else {}
        for layer in range(number * layers // shards, (number + 1) * layers // shards):
            tensors |= shard(generator, f"esm.encoder.layer.{layer}.", width, 4 * width)
        save_file(tensors, folder / name, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def measure(small: Path, cases: list[dict]) -> list[tuple[int, int]]:
    """(bytes kept, or of the file written; the most that was resident beyond what was before) of each case.

    small: a folder as those of the cases, to load before anything is measured.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=json.dumps([str(small), *({"command": None, "load": None} | case for case in cases)]),
        capture_output=True,
        text=True,
        env=os.environ | {"ESM_FAST_CACHE": "/nonexistent", "MALLOC_MMAP_THRESHOLD_": str(MMAP_FROM)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")[: len(cases)]
    assert all(lines), done.stderr
    return [tuple(json.loads(line)) for line in lines]


def test_large_models_take_little_more_memory_than_what_is_kept(tmp_path):
    folder = write_sharded(tmp_path / "sharded", LAYERS, WIDTH, HEADS)
    loads = [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "packed": True}, {"dtype": "int8"}]
    cases = [{"load": {"name_or_path": str(folder), "backend": "cpu"} | options} for options in loads]
    for name, *options in (["i", "--pack", "--dtype", "int8"], ["b", "--dtype", "bfloat16"]):
        cases.append({"command": ["convert", str(folder), str(tmp_path / f"{name}.safetensors"), *options]})
    wide = write_sharded(tmp_path / "wide", *WIDE)
    cases += [{"load": {"name_or_path": str(wide), "backend": "cpu"} | options} for options in loads[1:]]
    small = write_sharded(tmp_path / "small", 2, 80, HEADS)
    for case, (kept, peak) in zip(cases, measure(small, cases), strict=True):
        assert peak <= ALLOWED * kept + NOISE, (case, peak / kept)
