"""The peers of the side-by-side run: one builder each, all of them on the same weights.

A builder takes a `Setup` and returns `run(proteins) -> float32 (n, embed_dim)`, where proteins are (label, residues)
pairs of at most 1,022 residues: strings in, mean-pooled last-layer embeddings out in the order given, tokenising
included. Nothing is imported from a peer before its builder runs: one that is not installed costs the others nothing.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from esm_fast.alphabet import TOKENS

Proteins = list[tuple[str, str]]
Run = Callable[[Proteins], np.ndarray]


@dataclass(frozen=True)
class Size:
    """The sizes that decide the cost; the defaults are ESM-1b's."""

    layers: int = 33
    embed_dim: int = 1280
    ffn_embed_dim: int = 5120
    attention_heads: int = 20
    max_positions: int = 1024

    def flops(self, lengths: np.ndarray) -> tuple[float, float]:
        """(GEMM, attention) floating-point operations for sequences of so many tokens, none of them padding."""
        gemm = 2 * lengths.sum() * self.layers * (4 * self.embed_dim**2 + 2 * self.embed_dim * self.ffn_embed_dim)
        return float(gemm), float(4 * self.layers * self.embed_dim * (lengths.astype(float) ** 2).sum())


TINY = Size(layers=2, embed_dim=32, ffn_embed_dim=64, attention_heads=2)


@dataclass(frozen=True)
class Setup:
    """What every peer is given: fp32 weights under fair-esm's names, and the most tokens of a padded batch."""

    size: Size
    state: dict[str, torch.Tensor]
    batch_tokens: int


@dataclass(frozen=True)
class Peer:
    name: str
    dtype: str  # "fp32" or "bf16": the peak it is measured against, the tolerance it is held to
    needs: tuple[str, ...]  # modules that must be installed
    build: Callable[[Setup], Run]

    def missing(self) -> list[str]:
        return [module for module in self.needs if find_spec(module) is None]


def random_state(size: Size, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under fair-esm's names, scaled to keep activations of order 1 and attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def normal(name, *shape, std=1.0, mean=0.0):
        state[name] = torch.empty(shape).normal_(mean, std, generator=generator)

    def linear(name, rows, columns, gain=1.0):
        normal(f"{name}.weight", rows, columns, std=gain * columns**-0.5)
        normal(f"{name}.bias", rows, std=0.1)

    def norm(name):
        normal(f"{name}.weight", width, std=0.1, mean=1.0)
        normal(f"{name}.bias", width, std=0.1)

    width, hidden = size.embed_dim, size.ffn_embed_dim
    normal("embed_tokens.weight", len(TOKENS), width)
    normal("embed_positions.weight", size.max_positions + 2, width)
    for name in ("embed_tokens.weight", "embed_positions.weight"):
        state[name][TOKENS.index("<pad>")] = 0
    state["embed_tokens.weight"][TOKENS.index("<mask>")] = 0
    norm("emb_layer_norm_before")
    for i in range(size.layers):
        for part in "qkv":  # the gain gives attention scores a standard deviation of 2
            linear(f"layers.{i}.self_attn.{part}_proj", width, width, gain=1.0 if part == "v" else 2**0.5)
        linear(f"layers.{i}.self_attn.out_proj", width, width)
        norm(f"layers.{i}.self_attn_layer_norm")
        linear(f"layers.{i}.fc1", hidden, width)
        linear(f"layers.{i}.fc2", width, hidden)
        norm(f"layers.{i}.final_layer_norm")
    norm("emb_layer_norm_after")
    linear("lm_head.dense", width, width)
    norm("lm_head.layer_norm")
    state["lm_head.weight"] = state["embed_tokens.weight"]
    normal("lm_head.bias", len(TOKENS), std=0.1)
    linear("contact_head.regression", 1, size.layers * size.attention_heads)
    return state


def padded_batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, longest first, in batches of at most so many tokens once padded to their first, which is the longest."""
    batch = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def in_padded_batches(setup: Setup, embed: Callable[[Proteins], np.ndarray]) -> Run:
    """Wrap a function of one batch of proteins into one of many, sorted by length to waste the least padding."""

    @torch.inference_mode()
    def run(proteins):
        out = np.empty((len(proteins), setup.size.embed_dim), dtype=np.float32)
        for batch in padded_batches([len(residues) + 2 for _, residues in proteins], setup.batch_tokens):
            out[batch] = embed([proteins[i] for i in batch])
        return out

    return run


def mean_of_residues(hidden: torch.Tensor, proteins: Proteins) -> np.ndarray:
    """(B, T, E) of any floating dtype -> fp32 (B, E): the mean of each row without its cls, eos and padding."""
    rows = zip(hidden, proteins, strict=True)
    return torch.stack([row[1 : len(residues) + 1].float().mean(0) for row, (_, residues) in rows]).numpy()


def fair_esm(setup: Setup) -> Run:
    from argparse import Namespace

    from esm.data import Alphabet
    from esm.model.esm1 import ProteinBertModel

    alphabet = Alphabet.from_architecture("roberta_large")
    args = Namespace(arch="roberta_large", token_dropout=True, emb_layer_norm_before=True, **vars(setup.size))
    with torch.device("meta"):  # nothing is initialised: the weights are the shared tensors themselves
        model = ProteinBertModel(args, alphabet)
    model.load_state_dict(setup.state, assign=True)
    model.eval()
    convert = alphabet.get_batch_converter()

    def embed(proteins):
        _, _, tokens = convert(proteins)
        hidden = model(tokens, repr_layers=[setup.size.layers])["representations"][setup.size.layers]
        return mean_of_residues(hidden, proteins)

    return in_padded_batches(setup, embed)


HF_NAMES = (
    ("embed_tokens.", "embeddings.word_embeddings."),
    ("embed_positions.", "embeddings.position_embeddings."),
    ("emb_layer_norm_before.", "embeddings.layer_norm."),
    ("emb_layer_norm_after.", "encoder.emb_layer_norm_after."),
    ("self_attn.q_proj.", "attention.self.query."),
    ("self_attn.k_proj.", "attention.self.key."),
    ("self_attn.v_proj.", "attention.self.value."),
    ("self_attn.out_proj.", "attention.output.dense."),
    ("self_attn_layer_norm.", "attention.LayerNorm."),
    ("fc1.", "intermediate.dense."),
    ("fc2.", "output.dense."),
    ("final_layer_norm.", "LayerNorm."),
)


def hf_name(name: str) -> str:
    """fair-esm's name of a tensor of the encoder -> Hugging Face's."""
    prefix, rest = "", name
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        prefix = f"encoder.layer.{layer}."
    ours, theirs = next(pair for pair in HF_NAMES if rest.startswith(pair[0]))
    return prefix + theirs + rest.removeprefix(ours)


def hf_parts(setup: Setup, dtype: torch.dtype):
    """(EsmModel with SDPA attention, EsmTokenizer) on the shared weights."""
    from transformers import EsmConfig, EsmModel, EsmTokenizer

    size = setup.size
    config = EsmConfig(
        vocab_size=len(TOKENS),
        hidden_size=size.embed_dim,
        num_hidden_layers=size.layers,
        num_attention_heads=size.attention_heads,
        intermediate_size=size.ffn_embed_dim,
        max_position_embeddings=size.max_positions + 2,
        position_embedding_type="absolute",
        layer_norm_eps=1e-5,
        emb_layer_norm_before=True,
        token_dropout=True,
        pad_token_id=TOKENS.index("<pad>"),
        mask_token_id=TOKENS.index("<mask>"),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = EsmModel(config, add_pooling_layer=False)
    encoder = {k: v for k, v in setup.state.items() if not k.startswith(("lm_head.", "contact_head."))}
    state = {hf_name(k): v.to(dtype) for k, v in encoder.items()}
    # transformers keeps the contact head inside the encoder, where mean embeddings have no use for it
    state |= {k: v for k, v in setup.state.items() if k.startswith("contact_head.")}
    model.load_state_dict(state, assign=True)
    model.embeddings.position_ids = torch.arange(size.max_positions + 2)[None]  # the one buffer no checkpoint holds
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder, "vocab.txt")
        vocabulary.write_text("\n".join(TOKENS))
        tokenizer = EsmTokenizer(str(vocabulary))
    return model.eval(), tokenizer


def hugging_face(dtype: torch.dtype) -> Callable[[Setup], Run]:
    def build(setup):
        model, tokenizer = hf_parts(setup, dtype)

        def embed(proteins):
            inputs = tokenizer([residues for _, residues in proteins], padding=True, return_tensors="pt")
            return mean_of_residues(model(**inputs).last_hidden_state, proteins)

        return in_padded_batches(setup, embed)

    return build


def openvino_bf16(setup: Setup) -> Run:
    import openvino

    model, tokenizer = hf_parts(setup, torch.float32)

    class LastHidden(torch.nn.Module):  # one tensor out, so that the converted graph has one output
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    # two rows of unequal length: with a mask of ones transformers would leave the mask out of the traced graph
    example = dict(tokenizer(["MKTAYIAKQR", "MKTAY"], padding=True, return_tensors="pt"))
    with torch.inference_mode():
        graph = openvino.convert_model(
            LastHidden(), example_input=example, input=[("input_ids", [-1, -1]), ("attention_mask", [-1, -1])]
        )
    hints = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}  # LATENCY: all threads on one batch
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(graph, "CPU", hints | threads)

    def embed(proteins):
        inputs = tokenizer([residues for _, residues in proteins], padding=True, return_tensors="np")
        hidden = compiled({"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]})[0]
        return mean_of_residues(torch.from_numpy(hidden), proteins)

    return in_padded_batches(setup, embed)


def ours(dtype: torch.dtype) -> Callable[[Setup], Run]:
    def build(setup):
        from esm_fast.engine import embed
        from esm_fast.models.esm1 import ESM1, Config

        with torch.device("meta"):
            model = ESM1(Config(**vars(setup.size)))
        model.load_state_dict({k: v.to(dtype) for k, v in setup.state.items()}, assign=True)
        model.eval()

        def run(proteins):
            layer = setup.size.layers
            results = embed(model, proteins, layers=(layer,), batch_tokens=setup.batch_tokens)
            return np.stack([arrays[layer] for _, arrays in results])

        return run

    return build


PEERS = (
    Peer("fair-esm-fp32", "fp32", ("esm",), fair_esm),
    Peer("hf-fp32", "fp32", ("transformers",), hugging_face(torch.float32)),
    Peer("esm_fast-fp32", "fp32", (), ours(torch.float32)),
    Peer("hf-bf16", "bf16", ("transformers",), hugging_face(torch.bfloat16)),
    Peer("openvino-bf16", "bf16", ("transformers", "openvino"), openvino_bf16),
    Peer("esm_fast-bf16", "bf16", (), ours(torch.bfloat16)),
)
