"""What runs in esm-cpp's environment (see esm_cpp_peers.py): lines of JSON in, lines of JSON out.

The first line names the weights, and the proteins to calibrate with if it is to compute in 8 bits; each further one is
a list of proteins, answered by the mean logits over the residues of each.
"""

import json
import sys

import esm_cpp
import numpy as np

ALPHA, PERCENTILE = 0.5, 99.9  # of SmoothQuant, as esm-cpp's own command has them


def load(weights: str, calibration: list[str]):
    model, tokenizer = esm_cpp.Model.load_from_safetensors(weights), esm_cpp.Tokenizer()
    if calibration:
        observer = esm_cpp.ActivationObserver()
        for protein in calibration:
            model.forward_with_observer(encode(tokenizer, protein), None, observer)
        model.apply_smoothquant(observer.percentile(PERCENTILE), ALPHA)
        model.quantize_weights()
    return model, tokenizer


def encode(tokenizer, protein: str) -> np.ndarray:
    return np.asarray(tokenizer.encode(protein), dtype=np.int32)


def main() -> None:
    model, tokenizer = load(**json.loads(sys.stdin.readline()))
    answer(f"esm-cpp {esm_cpp.__version__} {esm_cpp.current_isa()}")
    for line in sys.stdin:
        logits = model.forward_scheduled([encode(tokenizer, protein) for protein in json.loads(line)])
        answer([rows[1:-1].mean(0, dtype=np.float64).tolist() for rows in logits])


def answer(value) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
