"""fair-esm, Hugging Face, and the strongest torch we could make, on the weights that all peers share."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Run, Setup, Size, in_padded_batches, mean_of_residues

from esm_fast.alphabet import TOKENS


def fair_esm(setup: Setup) -> Run:
    run, last = fair_esm_call(setup), setup.size.layers
    return in_padded_batches(
        setup, lambda proteins: mean_of_residues(run(proteins, repr_layers=[last])["representations"][last], proteins)
    )


def fair_esm_logits(setup: Setup) -> Run:
    """What peers that give logits alone are verified against."""
    run = fair_esm_call(setup)
    return in_padded_batches(setup, lambda proteins: mean_of_residues(run(proteins)["logits"], proteins))


def fair_esm_call(setup: Setup) -> Callable[..., dict[str, torch.Tensor]]:
    """fair-esm's model on the shared weights: proteins, arguments of its forward -> what that returns."""
    model, alphabet = fair_esm_parts(setup)
    convert = alphabet.get_batch_converter()
    return lambda proteins, **arguments: model(convert(proteins)[2], **arguments)


def fair_esm_parts(setup: Setup):
    """(fair-esm's model on the shared weights, its alphabet)."""
    with torch.device("meta"):  # nothing is initialised: the weights are the shared tensors themselves
        model, alphabet = FAIR_ESM[setup.size.family](setup.size)
    model.load_state_dict(setup.state, assign=True)
    return model.eval(), alphabet


def fair_esm1(size: Size):
    from argparse import Namespace

    from esm.data import Alphabet
    from esm.model.esm1 import ProteinBertModel

    alphabet = Alphabet.from_architecture("roberta_large")
    args = Namespace(arch="roberta_large", token_dropout=True, emb_layer_norm_before=True, **vars(size))
    return ProteinBertModel(args, alphabet), alphabet


def fair_esm2(size: Size):
    from esm.model.esm2 import ESM2

    model = ESM2(size.layers, size.embed_dim, size.attention_heads)
    return model, model.alphabet


FAIR_ESM = {"esm1": fair_esm1, "esm2": fair_esm2}  # by family

HF_NAMES = (
    ("layers.0.self_attn.rot_emb.", "rotary_embeddings."),  # one for all layers
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
    if name.startswith("layers.") and "rot_emb" not in name:
        _, layer, rest = name.split(".", 2)
        prefix = f"encoder.layer.{layer}."
    ours, theirs = next(pair for pair in HF_NAMES if rest.startswith(pair[0]))
    return prefix + theirs + rest.removeprefix(ours)


def hf_config(size: Size):
    """EsmConfig of a model of this size, without dropout; size: of ESM-1b if it names no family."""
    from transformers import EsmConfig

    learned = getattr(size, "family", "esm1") == "esm1"
    return EsmConfig(
        vocab_size=len(TOKENS),
        hidden_size=size.embed_dim,
        num_hidden_layers=size.layers,
        num_attention_heads=size.attention_heads,
        intermediate_size=size.ffn_embed_dim,
        max_position_embeddings=size.max_positions + 2 if learned else 1026,
        position_embedding_type="absolute" if learned else "rotary",
        layer_norm_eps=1e-5,
        emb_layer_norm_before=learned,
        token_dropout=True,
        pad_token_id=TOKENS.index("<pad>"),
        mask_token_id=TOKENS.index("<mask>"),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )


def hf_tokenizer():
    from transformers import EsmTokenizer

    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder, "vocab.txt")
        vocabulary.write_text("\n".join(TOKENS))
        return EsmTokenizer(str(vocabulary))


def hf_parts(size: Size, weights: dict[str, torch.Tensor], dtype: torch.dtype):
    """(EsmModel with SDPA attention, EsmTokenizer) on the shared weights."""
    from transformers import EsmModel

    config = hf_config(size)
    with torch.device("meta"):
        model = EsmModel(config, add_pooling_layer=False)
    encoder = {k: v for k, v in weights.items() if not k.startswith(("lm_head.", "contact_head."))}
    # Of the frequencies, transformers 5 holds one, in fp32 also in half precision.
    state = {hf_name(k): v.to(dtype) for k, v in encoder.items() if not k.endswith("inv_freq")}
    state |= {hf_name(k): v for k, v in encoder.items() if k == "layers.0.self_attn.rot_emb.inv_freq"}
    # transformers keeps the contact head inside the encoder, where mean embeddings have no use for it
    state |= {k: v for k, v in weights.items() if k.startswith("contact_head.")}
    model.load_state_dict(state, assign=True)
    model.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]  # no checkpoint holds it
    return model.eval(), hf_tokenizer()


def hugging_face(dtype: torch.dtype) -> Callable[[Setup], Run]:
    def build(setup):
        model, tokenizer = hf_parts(setup.size, setup.state, dtype)

        def embed(proteins):
            inputs = tokenizer([residues for _, residues in proteins], padding=True, return_tensors="pt")
            return mean_of_residues(model(**inputs).last_hidden_state, proteins)

        return in_padded_batches(setup, embed)

    return build


class PackedLinear:
    """A linear layer whose weights oneDNN has packed for good; GELU, or adding to a residual, is fused into it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.bias = bias.contiguous()

    def __call__(self, x: torch.Tensor, then: str = "none") -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], "none")

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


class PackedLayer:
    """One layer of ESM-1b on packed rows: q, k and v from one product, SDPA sequence by sequence."""

    def __init__(self, weights: dict[str, torch.Tensor], prefix: str, heads: int):
        self.norms = [
            (weights[f"{prefix}{norm}.weight"], weights[f"{prefix}{norm}.bias"])
            for norm in ("self_attn_layer_norm", "final_layer_norm")
        ]
        self.heads = heads

        def linear(*names):
            return PackedLinear(
                *(torch.cat([weights[f"{prefix}{name}.{part}"] for name in names]) for part in ("weight", "bias"))
            )

        self.qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out, self.fc1, self.fc2 = linear("self_attn.out_proj"), linear("fc1"), linear("fc2")

    def __call__(self, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        normed, normed_again = (lambda x, norm=norm: F.layer_norm(x, x.shape[-1:], *norm) for norm in self.norms)
        x = self.out.add_to(x, self.attend(self.qkv(normed(x)), lengths))
        return self.fc2.add_to(x, self.fc1(normed_again(x), "gelu"))

    def attend(self, qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        mixed = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        for rows, out in zip(qkv.split(lengths), mixed.split(lengths), strict=True):
            q, k, v = rows.view(len(rows), 3, self.heads, -1).permute(1, 2, 0, 3).unsqueeze(1)
            out.copy_(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1))
        return mixed


def torch_packed(setup: Setup) -> Run:
    """ESM-1b in bf16 as torch does it best: no padding, weights packed once, GELU and residuals fused into products."""
    from esm_fast.ops.embedding import KEPT_IN_TRAINING
    from esm_fast.sequences.batching import pack, plan
    from esm_fast.sequences.fasta import records_from
    from esm_fast.sequences.tokenize import Policy, Report, tokenize

    heads = ("lm_head.", "contact_head.")
    weights = {name: tensor.bfloat16() for name, tensor in setup.state.items() if not name.startswith(heads)}
    layers = [PackedLayer(weights, f"layers.{i}.", setup.size.attention_heads) for i in range(setup.size.layers)]
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("layers.")}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def hidden(batch):
        x = F.embedding(batch.tokens, weights["embed_tokens.weight"]) * KEPT_IN_TRAINING  # without <mask>, a constant
        x = norm(x + F.embedding(batch.positions, weights["embed_positions.weight"]), "emb_layer_norm_before")
        lengths = batch.lengths.tolist()
        for layer in layers:
            x = layer(x, lengths)
        return norm(x, "emb_layer_norm_after").split(lengths)

    @torch.inference_mode()
    def run(job):
        (records,) = records_from(job.proteins)
        tokens = tokenize(records, Policy(), Report())
        out = torch.empty(len(job.proteins), setup.size.embed_dim)
        for chosen in plan(tokens.lengths + 2, setup.batch_tokens):
            batch = pack(tokens.ids, tokens.offsets[:-1], tokens.lengths, chosen)
            for i, rows in zip(chosen, hidden(batch), strict=True):
                out[i] = rows[1:-1].float().mean(0)
        return out.numpy()

    return run
