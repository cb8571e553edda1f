"""The whole model on a GPU: ours on each backend, in CUDA graphs and compiled, fair-esm, Hugging Face; on one batch.

Everybody has the same random weights and the same proteins; ours packs them, the others pad. Residues a second.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
import torch
from common import TINY, Size, padded_batches
from gpu_ops import DTYPES, NOT_EAGER, Place
from peers import our_model
from random_weights import random_state
from torch_peers import hf_parts

from esm_fast.alphabet import TOKENS
from esm_fast.ops.registry import REFERENCE
from esm_fast.sequences.batching import pack

LENGTHS = (103, 187, 264, 351, 460, 683, 1022, 95)
TINY_LENGTHS = (5, 9)
SHORT = (300,)  # one protein, which a GPU computes in less time than its host takes to launch hundreds of kernels
BACKENDS = ("reference", "cutlass", "flash", "triton", "cuda", "xformers")
SHORTS = ("cutlass", "flash", "triton", "graphs")  # one protein; graphs: CUDA graphs of what the order chooses
LEAST_COSINE = 0.995  # of any residue's representation with ours on torch alone


def peers(place: Place) -> list[str]:
    """Who is compared; a name that cannot run here says so in its row."""
    ours = [f"esm_fast {name}" for name in BACKENDS]
    graphs = [] if place.tiny else [f"graph {name}" for name in BACKENDS[1:]]
    shorts = [f"short {name}" for name in (SHORTS[-1:] if place.tiny else SHORTS)]
    others = [] if place.tiny else ["compiled reference"]
    others += ["fair-esm"] * bool(find_spec("esm"))
    if find_spec("transformers"):
        others += [f"hf {attention}" for attention in (("sdpa",) if place.tiny else ("sdpa", "flash_attention_2"))]
    return [*ours, *graphs, *shorts, *others]


def rows(dtype: str, peer: str, place: Place) -> Iterator[dict]:
    """Of one peer: held to ours on the reference, then timed."""
    size = TINY if place.tiny else Size()
    lengths = np.array(TINY_LENGTHS if place.tiny else SHORT if peer.startswith("short") else LENGTHS * 4)
    ids = np.random.default_rng(0).integers(4, 24, lengths.sum(), dtype=np.uint8)
    state = random_state(size)
    about = {"model": peer, "dtype": dtype, "tokens": int((lengths + 2).sum()), "residues/s": "", "least cosine": ""}
    given = (size, state, lengths, ids, place)
    try:
        with torch.inference_mode():
            truth = _ours(*given, REFERENCE)(DTYPES[dtype], dtype)().float().cpu()
            run = _build(peer, given)(DTYPES[dtype], dtype)
            cosine = float(torch.nn.functional.cosine_similarity(run().float().cpu(), truth, dim=1).min())
            about["least cosine"] = round(cosine, 6)
            if not cosine >= LEAST_COSINE:  # NaN, too
                yield about | {"ok": False, "note": "WRONG, not timed"}
                return
            with torch._dynamo.config.patch(**NOT_EAGER):
                about["residues/s"] = round(1e3 * int(lengths.sum()) / place.milliseconds(run))
        yield about | {"ok": True, "note": ""}
    except Exception as error:  # such as a backend that cannot run here
        yield about | {"note": f"failed: {type(error).__name__}: {str(error)[:300]}"}


def _build(peer: str, given: tuple) -> Callable:
    """build(dtype, its name) -> run() -> (residues, embed_dim)."""
    kind, _, how = peer.partition(" ")
    if kind == "fair-esm":
        return _fair_esm(*given)
    if kind == "hf":
        return _hugging_face(*given, how)
    build = _ours(*given, how)
    return {"esm_fast": build, "short": build, "graph": _captured(build), "compiled": _compiled(build)}[kind]


def _compiled(build: Callable) -> Callable:
    """One graph, or an error: nothing of it runs eagerly."""
    return lambda dtype, name: torch.compile(build(dtype, name), fullgraph=True, dynamic=False)


def _captured(build: Callable) -> Callable:
    """Replayed as a CUDA graph."""

    def captured(dtype, name):
        run = build(dtype, name)
        run()  # loads and compiles what a capture cannot
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()

        def replay():
            graph.replay()
            return out

        return replay

    return captured


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
