"""A protein that no limit cuts: memory grows with its length, and what grows with the square is refused before it is
allocated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import esm_fast
from esm_fast import memory

LENGTH = 16_000
ALLOWED = LENGTH**2 // 2  # bytes: half of what one byte a pair would take

MEASURE = """
import json, os, sys, torch, esm_fast
from esm_fast.models.esm2 import Config
from esm_fast.models.padded import api_class
torch.set_num_threads(2)
def status(field):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(field))) * 1024
def peak(model, length, what):
    text = "LAGVSERTIDPKQNFYMHWC" * (length // 20)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    if what == "logits":
        with torch.inference_mode():
            model(torch.tensor([[0, *map(model.alphabet.get_idx, text), 2]]))
    else:
        list(esm_fast.embed(model, [text], pool=what))
    return status("VmHWM") - before
config = Config(1, 32, 128, 2)
found = {}
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    model = api_class(config)(config).eval().to(dtype)
    for what in ("mean", "per_residue", "logits"):
        peak(model, 20, what)  # imports what is imported late
        found[f"{dtype} {what}"] = peak(model, int(sys.argv[1]), what)
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_square_of_the_length():
    command = [sys.executable, "-c", MEASURE, str(LENGTH)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 6 and max(found.values()) < ALLOWED, found


def test_what_grows_with_the_square_is_refused_where_it_does_not_fit(monkeypatch):
    model, _ = esm_fast.load("random:esm2_t6_8M_UR50D")
    tokens = torch.randint(4, 24, (1, 700))
    monkeypatch.setattr(memory, "_WORTH_ASKING", 0)
    monkeypatch.setattr(memory, "available", lambda: 2 * 700**2 * 4)
    with torch.inference_mode():
        model(tokens, return_contacts=True)  # just fits
        monkeypatch.setattr(memory, "available", lambda: 2 * 700**2 * 4 - 1)
        with pytest.raises(MemoryError, match="a contact of each pair of 700 tokens takes 0.0 GiB of memory, of which"):
            model(tokens, return_contacts=True)
        with pytest.raises(MemoryError, match="a map of each pair of 700 tokens in each of 6 layers"):
            model(tokens, need_head_weights=True)
        model(tokens)


def test_what_is_free_is_known_here():
    room = memory.available()
    if Path("/proc/meminfo").exists():
        assert 1 << 20 < room < 1 << 50
