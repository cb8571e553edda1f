"""A masked scan by fair-esm as its predict.py does it, by Hugging Face in batches, and by ours, on the same weights.

A builder takes a `Setup` and a protein and returns `run(positions) -> float64 (positions, 20)`: log p(substitution) -
log p(wild type) of the 20 residues at each of these positions (from 0), each masked in a context of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from common import Setup
from peers import int8_missing, our_model
from torch_peers import fair_esm_parts, hf_config, hf_name, hf_tokenizer

from esm_fast.alphabet import MASK, TOKENS
from esm_fast.variants.parse import STANDARD

COLUMNS = [TOKENS.index(residue) for residue in STANDARD]
Run = Callable[[list[int]], np.ndarray]


@dataclass(frozen=True)
class ScanPeer:
    name: str
    dtype: str
    build: Callable[[Setup, str], Run]
    one_by_one: bool = False  # a pass a position: a few positions tell its rate
    why_not: Callable[[Setup], str] = lambda setup: ""


def ratios(log_probs: torch.Tensor, protein: str, positions: list[int]) -> np.ndarray:
    """(positions, 33) -> (positions, 20)"""
    own = torch.tensor([TOKENS.index(protein[at]) for at in positions])
    log_probs = log_probs.double()
    return (log_probs[:, COLUMNS] - log_probs.gather(1, own[:, None])).numpy()


def fair_esm(autocast: bool) -> Callable[[Setup, str], Run]:
    """The loop of examples/variant-prediction/predict.py: a pass a position, logits of all its tokens.

    A model in bf16 does not run (token dropout makes float32 of its embeddings): autocast is how its users have bf16,
    here around the whole loop, so that weights are rounded once.
    """

    def build(setup, protein):
        model, alphabet = fair_esm_parts(setup)
        _, _, tokens = alphabet.get_batch_converter()([("protein", protein)])

        @torch.no_grad()
        def run(positions):
            rows = []
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for at in positions:
                    masked = tokens.clone()
                    masked[0, at + 1] = alphabet.mask_idx
                    log_probs = torch.log_softmax(model(masked)["logits"], dim=-1)
                    rows.append(log_probs[0, at + 1])
            return ratios(torch.stack(rows), protein, positions)

        return run

    return build


def hugging_face(dtype: torch.dtype) -> Callable[[Setup, str], Run]:
    """EsmForMaskedLM with SDPA attention on as many masked copies at a time as the token budget has room for."""

    def build(setup, protein):
        from transformers import EsmForMaskedLM

        with torch.device("meta"):
            model = EsmForMaskedLM(hf_config(setup.size))
        state = {_hf_name(name): tensor.to(dtype) for name, tensor in setup.state.items()}
        state["lm_head.decoder.bias"] = state["lm_head.bias"]
        model.load_state_dict(state, assign=True, strict=False)
        model.esm.embeddings.position_ids = torch.arange(setup.size.max_positions + 2)[None]
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        model.eval()
        tokens = hf_tokenizer()(protein, return_tensors="pt")["input_ids"]
        together = max(1, setup.batch_tokens // tokens.shape[1])

        @torch.inference_mode()
        def run(positions):
            rows = []
            for begin in range(0, len(positions), together):
                some = torch.tensor(positions[begin : begin + together])
                ids = tokens.repeat(len(some), 1)
                place = torch.arange(len(some))
                ids[place, some + 1] = MASK
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                rows.append(torch.log_softmax(logits[place, some + 1].float(), dim=-1))
            return ratios(torch.cat(rows), protein, positions)

        return run

    return build


def _hf_name(name: str) -> str:
    """fair-esm's name of a tensor -> that of EsmForMaskedLM."""
    if name.startswith("lm_head."):
        return name.replace("lm_head.weight", "lm_head.decoder.weight")
    return f"esm.{name if name.startswith('contact_head.') else hf_name(name)}"


def ours(dtype: str) -> Callable[[Setup, str], Run]:
    def build(setup, protein):
        from esm_fast import variants

        model = our_model(setup.size, setup.state, dtype)

        def run(positions):
            names = [f"{protein[at]}{at + 1}{new}" for at in positions for new in STANDARD if new != protein[at]]
            scores = variants.score(model, protein, names, strategy="masked", batch_tokens=setup.batch_tokens)
            own = [COLUMNS.index(TOKENS.index(protein[at])) for at in positions]
            table = np.zeros((len(positions), len(STANDARD)))
            table[np.arange(len(STANDARD)) != np.array(own)[:, None]] = scores
            return table

        return run

    return build


PEERS = (
    ScanPeer("fair-esm-fp32", "fp32", fair_esm(autocast=False), one_by_one=True),
    ScanPeer("fair-esm-autocast-bf16", "bf16", fair_esm(autocast=True), one_by_one=True),
    ScanPeer("hf-bf16", "bf16", hugging_face(torch.bfloat16)),
    ScanPeer("esm_fast-fp32", "fp32", ours("float32")),
    ScanPeer("esm_fast-bf16", "bf16", ours("bfloat16")),
    ScanPeer("esm_fast-int8", "int8", ours("int8"), why_not=int8_missing),
)
