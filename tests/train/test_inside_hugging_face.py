"""Hugging Face's models trained with checkpointing, adapters and dropout: packed, with the losses of their own code."""

import warnings

import pytest
import torch

import esm_fast
from esm_fast.models.attached import NotPackedWarning
from esm_fast.models.encoder import Encoder

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*", "ignore::FutureWarning"),
]
LENGTHS = [40, 30, 20, 35, 12]
SIZES = dict(vocab_size=33, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
SIZES |= dict(max_position_embeddings=130, pad_token_id=1, mask_token_id=32, token_dropout=True, num_labels=3)
SIZES |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
TASKS = {"EsmForMaskedLM": None, "EsmForSequenceClassification": "SEQ_CLS", "EsmForTokenClassification": "TOKEN_CLS"}


def inputs(kind):
    ids = torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for row, length in zip(ids, LENGTHS, strict=True):
        row[:length] = torch.randint(4, 24, (length,), generator=generator)
        row[0], row[length - 1] = 0, 2
    mask = (ids != 1).long()
    labels = {"EsmForSequenceClassification": torch.arange(len(LENGTHS)) % 3}
    labels |= {"EsmForTokenClassification": torch.where(mask == 1, ids % 3, -100)}
    return dict(input_ids=ids, attention_mask=mask, labels=labels.get(kind, torch.where(mask == 1, ids, -100)))


def adapted(model, kind):
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(task_type=TASKS[kind], r=4, target_modules=["query", "value"]))


ORDERS = {
    "no adapters": (lambda model, kind: model, lambda model, kind: esm_fast.accelerate(model)),
    "adapters, then fast": (adapted, lambda model, kind: esm_fast.accelerate(adapted(model, kind))),
    "fast, then adapters": (adapted, lambda model, kind: adapted(esm_fast.accelerate(model), kind)),
}


def curve(kind, make, positions, checkpointing):
    torch.manual_seed(0)
    sizes = SIZES | dict(position_embedding_type=positions, emb_layer_norm_before=positions == "absolute")
    model = make(getattr(transformers, kind)(transformers.EsmConfig(**sizes)), kind).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(3):
        loss = model(**inputs(kind)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "positions, checkpointing", [("absolute", False), ("rotary", True)], ids=["absolute", "rotary, checkpointing"]
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", TASKS)
def test_training_stays_packed_with_the_same_losses(kind, order, positions, checkpointing, monkeypatch):
    plain, fast = ORDERS[order]
    expected = curve(kind, plain, positions, checkpointing)
    run, lengths = Encoder.run, []

    def counted(self, parts, batch, **options):
        lengths.append(len(batch.tokens))
        return run(self, parts, batch, **options)

    monkeypatch.setattr(Encoder, "run", counted)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotPackedWarning)
        assert curve(kind, fast, positions, checkpointing) == pytest.approx(expected, abs=1e-5)
    assert lengths == [sum(LENGTHS)] * 3 and expected[2] < expected[0]
