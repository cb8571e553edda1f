"""Hostile arguments to everything that takes some, from models to data sets, in child processes: no call crashes, hangs
or spoils the model for the call after it.

HOSTILE_MODEL_CALLS in the environment makes it run longer: docs/reliability.md has the figures of a long run.
"""

import collections
import copy
import os
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from fakes import fair_esm_model
from hostile import attempts, stand_ins

import esm_fast
from esm_fast import variants
from esm_fast.sequences.batching import pack_padded

CALLS = int(os.environ.get("HOSTILE_MODEL_CALLS", 400))
PROTEIN = "MKTVRQERLKSIVRILERSKEPVSG"
TOKENS = torch.tensor([[0, 20, 15, 32, 11, 7, 2], [0, 5, 5, 5, 2, 1, 1]])
# What a user may see; of each the subclasses that have a name for a user too. No AttributeError: it speaks of our code.
SAID = (TypeError, ValueError, IndexError, KeyError, RuntimeError, NotImplementedError, OSError)
OURS = ("incompatible function arguments", "has no attribute", "has no len()")  # of TypeErrors: pybind11's and Python's


def hugging_face():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.EsmConfig(vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                    intermediate_size=48, pad_token_id=1, mask_token_id=32, token_dropout=True,
                                    max_position_embeddings=64, emb_layer_norm_before=True)  # fmt: skip
    return esm_fast.accelerate(transformers.EsmForMaskedLM(config).eval())


@pytest.fixture(scope="module")
def targets(fair_checkpoint, tmp_path_factory):
    """name -> (a function, the arguments that it takes as they should be)."""
    model, alphabet = esm_fast.load(str(fair_checkpoint))
    drop_in, hosted = esm_fast.accelerate(copy.deepcopy(fair_esm_model(layers=2))), hugging_face()
    batch, _ = pack_padded(TOKENS)
    convert = alphabet.get_batch_converter()
    words = pytest.importorskip("esm_fast.compat.hf_tokenizer").EsmTokenizer()
    asked = dict(repr_layers=[1], need_head_weights=True, return_contacts=False)
    packed = dict(layers=(1,), rows=torch.tensor([0, 3]), logits=True, attentions=False, contacts=False, scale=None,
                  keep=None, embedded=None)  # fmt: skip
    attended = dict(input_ids=TOKENS, attention_mask=(TOKENS != 1).long(), inputs_embeds=None, labels=TOKENS,
                    output_hidden_states=True, output_attentions=False)  # fmt: skip
    embed = dict(sequences=[("a", PROTEIN)], layers=(-1,), pool="mean", batch_tokens=100, unknown="x", empty="skip",
                 overlength="window")  # fmt: skip

    fields = ("tokens", "positions", "cu_seqlens", "max_seqlen")

    def forward_packed(**options):
        made = replace(batch, **{name: options.pop(name) for name in fields})
        return model.forward_packed(made, **options)

    one = {name: getattr(batch, name) for name in fields}
    return {
        "model": (model, dict(tokens=TOKENS, **asked)),
        "predict_contacts": (model.predict_contacts, dict(tokens=TOKENS)),
        "forward_packed": (forward_packed, {**one, **packed}),
        "embed": (lambda **options: list(esm_fast.embed(model, **options)), embed),
        "fair-esm's": (drop_in, dict(tokens=TOKENS, **asked)),
        "transformers'": (hosted, attended),
        "batch converter": (convert, dict(raw_batch=[("a", PROTEIN), ("b", "MK")])),
        "encode": (alphabet.encode, dict(text=PROTEIN)),
        "tokenize": (alphabet.tokenize, dict(text=PROTEIN)),
        "a sequence": (lambda text: list(esm_fast.embed(model, [text])), dict(text=PROTEIN)),
        "Hugging Face's tokenizer": (words, dict(text=PROTEIN, text_pair=None, max_length=10, truncation=True)),
        "index": (alphabet.get_idx, dict(tok="A")),
        "score": (
            lambda **options: variants.score(model, **options),
            dict(sequence=PROTEIN, variants=["M1A"], strategy="masked"),
        ),
    }, model


def drawn(targets, seed: int):
    rng = random.Random(seed)
    name = rng.choice(sorted(targets))
    function, arguments = targets[name]
    changes = {}
    for _ in range(rng.choice([1, 1, 2])):
        argument = rng.choice(sorted(arguments))
        changes[argument] = rng.choice(sorted(stand_ins(arguments[argument], rng).items()))
    return name, function, arguments, changes


def attempt(targets, model, expected, seed: int) -> str:
    _, function, arguments, changes = drawn(targets, seed)
    arguments = {n: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v) for n, v in arguments.items()}
    try:
        made = {argument: make() for argument, (_, make) in changes.items()}
    except (RuntimeError, TypeError, NotImplementedError, ValueError, IndexError):
        return "no such stand-in"
    try:
        function(**arguments | made)
        said = "returned"
    except SAID as error:
        if isinstance(error, RecursionError) or any(words in str(error) for words in OURS):
            raise
        said = type(error).__name__
    if not torch.equal(embedded(model), expected):
        return "spoilt"
    return said


def embedded(model):
    with torch.no_grad():
        return model(TOKENS, repr_layers=[1])["representations"][1]


def test_no_hostile_call_crashes_or_spoils_the_model(targets):
    targets, model = targets
    torch.set_num_threads(1)
    expected = embedded(model)
    seen, bad = collections.Counter(), []
    calls = [(str(seed), partial(attempt, targets, model, expected, seed)) for seed in range(CALLS)]
    for outcome in attempts(calls):
        kind = outcome.returned or ("crash" if outcome.crash else outcome.error[0])
        seen[kind] += 1
        if outcome.crash or outcome.error or kind == "spoilt":
            name, _, _, changes = drawn(targets, int(outcome.name))
            bad.append((name, {argument: kind for argument, (kind, _) in changes.items()}, outcome))
    print(dict(seen))
    assert not bad, f"{len(bad)} of {CALLS}, {seen}: " + "\n".join(map(str, bad[:20]))
    assert seen["returned"] > CALLS / 20 and seen["ValueError"] + seen["TypeError"] > CALLS / 5, seen
