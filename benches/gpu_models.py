"""The whole model on a GPU: ours on each backend, fair-esm, Hugging Face with SDPA and FlashAttention-2, on one batch.

Everybody has the same random weights and the same proteins; ours packs them, the others pad. Residues a second.
"""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from common import TINY, Size, padded_batches
from gpu_ops import DTYPES, Place
from peers import our_model
from random_weights import random_state
from torch_peers import hf_parts

from esm_fast.alphabet import TOKENS
from esm_fast.sequences.batching import pack

LENGTHS = (103, 187, 264, 351, 460, 683, 1022, 95)
TINY_LENGTHS = (5, 9)
LEAST_COSINE = 0.995  # of any residue's representation with ours on torch alone


def rows(place: Place) -> list[dict]:
    size = TINY if place.tiny else Size()
    lengths = np.array(TINY_LENGTHS if place.tiny else LENGTHS * 4)
    ids = np.random.default_rng(0).integers(4, 24, lengths.sum(), dtype=np.uint8)
    state = random_state(size)
    found = []
    for name in place.dtypes:
        truth = None
        for peer, build in _peers(size, state, lengths, ids, place):
            about = {"model": peer, "dtype": name, "residues/s": "", "least cosine": "", "note": ""}
            try:
                run = build(DTYPES[name], name)
                with torch.inference_mode():
                    got = run().float().cpu()
                    truth = got if truth is None else truth
                    cosine = float(torch.nn.functional.cosine_similarity(got, truth, dim=1).min())
                    about["least cosine"] = round(cosine, 6)
                    if cosine < LEAST_COSINE:
                        about["note"] = "WRONG, not timed"
                    else:
                        about["residues/s"] = round(1e3 * int(lengths.sum()) / place.milliseconds(run))
            except Exception as error:  # a peer that fails must not cost the report on the others
                about["note"] = f"failed: {type(error).__name__}: {str(error)[:300]}"
            found.append(about)
    return found


def _peers(size: Size, state, lengths, ids, place: Place) -> list[tuple[str, Callable]]:
    """(name, build(dtype, its name) -> run() -> (residues, embed_dim)); the first is what the others are held to."""
    backends = ("reference", "cutlass", "triton", "xformers")
    peers = [(f"esm_fast {name}", _ours(size, state, lengths, ids, place, name)) for name in backends]
    if find_spec("esm"):
        peers.append(("fair-esm", _fair_esm(size, state, lengths, ids, place)))
    if find_spec("transformers"):
        for attention in ("sdpa",) if place.tiny else ("sdpa", "flash_attention_2"):
            peers.append((f"hf {attention}", _hugging_face(size, state, lengths, ids, place, attention)))
    return peers


def _ours(size, state, lengths, ids, place: Place, backend: str) -> Callable:
    def build(dtype, name):
        names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        model = our_model(size, state, names[name], backend).to(place.device)
        batch = pack(ids, lengths.cumsum() - lengths, lengths, np.arange(len(lengths))).to(place.device)
        inner = torch.cat([torch.arange(n) + 1 + before for n, before in _starts(lengths)]).to(place.device)

        def run():
            return model.forward_packed(batch, layers=(size.layers,)).representations[size.layers][inner]

        return run

    return build


def _starts(lengths) -> list[tuple[int, int]]:
    """(residues, first token) of each packed protein."""
    ends = np.cumsum(lengths + 2)
    return list(zip(lengths.tolist(), (ends - lengths - 2).tolist(), strict=True))


def _padded(lengths, ids, place: Place, budget: int = 8192) -> list[tuple[list[int], torch.Tensor]]:
    """[(which proteins, their padded tokens)], of similar lengths together."""
    parts = np.split(ids, lengths.cumsum()[:-1])
    found = []
    for chosen in padded_batches((lengths + 2).tolist(), budget):
        tokens = torch.full((len(chosen), int(lengths[chosen].max()) + 2), TOKENS.index("<pad>"))
        for row, i in zip(tokens, chosen, strict=True):
            inner = torch.from_numpy(parts[i].astype(np.int64))
            row[: len(inner) + 2] = torch.cat([torch.tensor([0]), inner, torch.tensor([2])])
        found.append((list(chosen), tokens.to(place.device)))
    return found


def _in_order(outputs, lengths) -> torch.Tensor:
    """Residue rows of padded outputs, in the proteins' order."""
    rows = {}
    for chosen, hidden in outputs:
        rows |= {i: hidden[row, 1 : lengths[i] + 1] for row, i in enumerate(chosen)}
    return torch.cat([rows[i] for i in range(len(lengths))])


def _fair_esm(size, state, lengths, ids, place: Place) -> Callable:
    def build(dtype, name):
        from argparse import Namespace

        from esm.data import Alphabet
        from esm.model.esm1 import ProteinBertModel

        arguments = Namespace(arch="roberta_large", token_dropout=True, emb_layer_norm_before=True, **vars(size))
        model = ProteinBertModel(arguments, Alphabet.from_architecture("roberta_large"))
        model.load_state_dict(state)
        model = model.eval().to(place.device, dtype)
        batches = _padded(lengths, ids, place)

        def run():
            layers = [size.layers]
            hidden = ((i, model(tokens, repr_layers=layers)["representations"][size.layers]) for i, tokens in batches)
            return _in_order(hidden, lengths)

        return run

    return build


def _hugging_face(size, state, lengths, ids, place: Place, attention: str) -> Callable:
    def build(dtype, name):
        model, _ = hf_parts(size, state, dtype)
        model = model.to(place.device)
        model.set_attn_implementation(attention)
        batches = _padded(lengths, ids, place)

        def run():
            pad = TOKENS.index("<pad>")
            hidden = (
                (i, model(tokens, attention_mask=(tokens != pad).long()).last_hidden_state) for i, tokens in batches
            )
            return _in_order(hidden, lengths)

        return run

    return build
