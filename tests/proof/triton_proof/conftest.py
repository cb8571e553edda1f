"""In the interpreter's own pytest process, every launch is watched and fresh memory is poisoned."""

import json
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton_proof import numerics, sanitizer, speed

    speed.install()
    numerics.install()
    sanitizer.install()
    # torch.empty returns NaN (the largest integer): what no kernel wrote is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture
def proof():
    """Adds one line of JSON to the file in ESM_FAST_PROOF, where there is one."""

    def record(**facts):
        if path := os.environ.get("ESM_FAST_PROOF"):
            with open(path, "a") as file:
                file.write(json.dumps(facts) + "\n")

    return record
